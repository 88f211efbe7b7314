# SPDX-License-Identifier: MIT
# Target docs: the reference, of comments in the headers, and the pages under cmake/docs/, as a site in
# build/docs, where build/docs/index.html is the first page. It needs no network.
find_package(Doxygen 1.9 REQUIRED)
find_package(Python3 REQUIRED COMPONENTS Interpreter)
find_path(LOCAL_MHA_MATHJAX_DIR MathJax.js PATHS /usr/share/javascript/mathjax /usr/share/mathjax NO_DEFAULT_PATH)
if(NOT LOCAL_MHA_MATHJAX_DIR)
  message(FATAL_ERROR "There is no MathJax 2 (cmake/setup.sh --docs installs it): set LOCAL_MHA_MATHJAX_DIR")
endif()

if(NOT TARGET attention_map)
  message(FATAL_ERROR "LOCAL_MHA_DOCS needs LOCAL_MHA_BUILD_EXAMPLES, whose programs make the pictures")
endif()

set(docs_dir "${PROJECT_BINARY_DIR}")
file(STRINGS cmake/docs/public_headers.txt headers)
file(GLOB pages CONFIGURE_DEPENDS cmake/docs/*.md)
set(sources ${pages} "${PROJECT_SOURCE_DIR}/cmake/docs/namespaces.dox")
foreach(header IN LISTS headers)
  if(NOT EXISTS "${PROJECT_SOURCE_DIR}/include/${header}")
    message(FATAL_ERROR "cmake/docs/public_headers.txt lists ${header}, which is not there")
  endif()
  list(APPEND sources "${PROJECT_SOURCE_DIR}/include/${header}")
endforeach()
# What a user's include of the entry header names is public.
file(STRINGS include/local_mha/local_mha.hpp includes REGEX "^#include <local_mha/")
foreach(include IN LISTS includes)
  string(REGEX REPLACE ".*<(.*)>.*" "\\1" include "${include}")
  if(NOT include IN_LIST headers)
    message(FATAL_ERROR "cmake/docs/public_headers.txt does not list ${include}")
  endif()
endforeach()
list(JOIN sources "\" \"" docs_input)
set(docs_input "\"${docs_input}\"")
configure_file(cmake/docs/Doxyfile.in "${docs_dir}/Doxyfile" @ONLY)

# Of MathJax, what its SVG needs.
file(MAKE_DIRECTORY "${docs_dir}/pictures" "${docs_dir}/mathjax/jax/output/SVG/fonts" "${docs_dir}/mathjax/fonts")
set(copy_mathjax "")
foreach(part MathJax.js extensions jax/input/TeX jax/element jax/output/SVG)
  if(IS_DIRECTORY "${LOCAL_MHA_MATHJAX_DIR}/${part}")
    list(APPEND copy_mathjax COMMAND ${CMAKE_COMMAND} -E copy_directory "${LOCAL_MHA_MATHJAX_DIR}/${part}"
         "${docs_dir}/mathjax/${part}")
  else()
    list(APPEND copy_mathjax COMMAND ${CMAKE_COMMAND} -E copy_if_different "${LOCAL_MHA_MATHJAX_DIR}/${part}"
         "${docs_dir}/mathjax/${part}")
  endif()
endforeach()

add_custom_target(
  docs
  COMMAND attention_map pattern "${docs_dir}/pictures/causal.png" --seqlen 48 --window-size 16 --causal
  COMMAND attention_map pattern "${docs_dir}/pictures/whole_windows.png" --seqlen 48 --window-size 16
          --exact-windowsize false
  ${copy_mathjax}
  COMMAND ${DOXYGEN_EXECUTABLE} "${docs_dir}/Doxyfile"
  COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/undocumented.py" "${docs_dir}/warnings.txt"
          "${PROJECT_SOURCE_DIR}/include"
  COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_links.py" "${docs_dir}"
  COMMENT "The site in ${docs_dir}"
  VERBATIM)

enable_testing()
find_program(LOCAL_MHA_CHROMIUM NAMES chromium chromium-browser google-chrome)
if(LOCAL_MHA_CHROMIUM)
  add_test(NAME docs.browser
           COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_in_browser.py" "${LOCAL_MHA_CHROMIUM}"
                   "${docs_dir}")
endif()
add_test(NAME docs.links COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_links.py" "${docs_dir}")
