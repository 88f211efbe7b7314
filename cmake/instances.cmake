# SPDX-License-Identifier: MIT
# What the tests and examples use of the library in float, double and bfloat16, compiled once for all
# of them: see extern.hpp.
find_package(Threads REQUIRED)

# local_mha_link_first(LIBRARY OBJECTS): who links LIBRARY gets these before its own files. Of an inline
# function that both have, the linker takes the first, and these are optimized.
function(local_mha_link_first library objects)
  target_link_options(${library} INTERFACE $<TARGET_OBJECTS:${objects}>)
  set_property(TARGET ${library} APPEND PROPERTY INTERFACE_LINK_DEPENDS
                                                 $<TARGET_OBJECTS:${objects}>)
  # To Make, a file of another folder's target is only a file.
  add_dependencies(${library} ${objects})
endfunction()

add_library(local_mha_instances INTERFACE)
target_link_libraries(local_mha_instances INTERFACE local_mha Threads::Threads)
# Of one kind in all files. The second lets a test forbid Eigen's own allocations.
target_compile_definitions(
  local_mha_instances INTERFACE EIGEN_USE_THREADS= EIGEN_RUNTIME_NO_MALLOC=
                                LOCAL_MHA_STORAGE=Eigen::bfloat16 LOCAL_MHA_ARITHMETIC=Eigen::bfloat16)
# What stores or multiplies in bfloat16 links these, which the others do without.
add_library(local_mha_bfloat16_instances INTERFACE)
target_link_libraries(local_mha_bfloat16_instances INTERFACE local_mha_instances)

set(instantiate_float "#define LOCAL_MHA_INSTANTIATE float\n")
set(instantiate_double "#define LOCAL_MHA_INSTANTIATE double\n")
set(instantiate_bfloat16 "#define LOCAL_MHA_INSTANTIATE_STORAGE Eigen::bfloat16
#define LOCAL_MHA_INSTANTIATE_ARITHMETIC Eigen::bfloat16\n")
foreach(scalar float double bfloat16)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${scalar}_instances.cpp")
  file(CONFIGURE OUTPUT "${source}" @ONLY CONTENT
       "${instantiate_${scalar}}#include <local_mha/extern.hpp>\n")
  add_library(local_mha_${scalar} OBJECT EXCLUDE_FROM_ALL "${source}")
  target_compile_definitions(
    local_mha_${scalar}
    PRIVATE $<TARGET_PROPERTY:local_mha_instances,INTERFACE_COMPILE_DEFINITIONS>)
  target_link_libraries(local_mha_${scalar} PRIVATE local_mha Threads::Threads)
endforeach()
set(LOCAL_MHA_BFLOAT16_OPTIONS "" CACHE STRING "Options of the instances of bfloat16, such as -O0 where nobody runs them")
target_compile_options(local_mha_bfloat16 PRIVATE ${LOCAL_MHA_BFLOAT16_OPTIONS})
local_mha_link_first(local_mha_instances local_mha_float)
local_mha_link_first(local_mha_instances local_mha_double)
local_mha_link_first(local_mha_bfloat16_instances local_mha_bfloat16)

# local_mha_precompile(NAME header... LIBRARIES library...): a precompiled header for programs that
# link these. Such programs get extern.hpp before all else.
function(local_mha_precompile name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LIBRARIES")
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "// All is in the precompiled header.\n")
  add_library(${name} OBJECT EXCLUDE_FROM_ALL "${source}")
  set_target_properties(
    ${name} PROPERTIES LOCAL_MHA_LIBRARIES "local_mha_instances;${arg_LIBRARIES}"
                       LOCAL_MHA_HEADERS "<local_mha/extern.hpp>;${arg_UNPARSED_ARGUMENTS}")
  target_link_libraries(${name} PRIVATE local_mha_instances ${arg_LIBRARIES})
  target_precompile_headers(${name} PRIVATE <local_mha/extern.hpp> ${arg_UNPARSED_ARGUMENTS})
endfunction()

# local_mha_reuse(TARGET NAME): that header, and the libraries whose macros it was made with.
function(local_mha_reuse target name)
  get_target_property(libraries ${name} LOCAL_MHA_LIBRARIES)
  target_link_libraries(${target} PRIVATE ${libraries})
  if(CMAKE_DISABLE_PRECOMPILE_HEADERS)
    get_target_property(headers ${name} LOCAL_MHA_HEADERS)
    foreach(header IN LISTS headers)
      string(REGEX REPLACE "^<(.*)>$" "\\1" header "${header}")
      target_compile_options(${target} PRIVATE "SHELL:-include ${header}")
    endforeach()
    return()
  endif()
  target_precompile_headers(${target} REUSE_FROM ${name})
endfunction()
