# SPDX-License-Identifier: MIT
# Target docs: the reference, of comments in the headers, and the pages under cmake/docs/, as a site in
# build/docs, where build/docs/index.html is the first page. It needs no network.
find_package(Doxygen 1.9 REQUIRED)
find_package(Python3 REQUIRED COMPONENTS Interpreter)
find_path(LOCAL_MHA_MATHJAX_DIR MathJax.js PATHS /usr/share/javascript/mathjax /usr/share/mathjax NO_DEFAULT_PATH)
if(NOT LOCAL_MHA_MATHJAX_DIR)
  message(FATAL_ERROR "There is no MathJax 2 (cmake/setup.sh --docs installs it): set LOCAL_MHA_MATHJAX_DIR")
endif()

if(NOT TARGET attention_map OR NOT TARGET local_mha_pictures)
  message(FATAL_ERROR "LOCAL_MHA_DOCS needs LOCAL_MHA_BUILD_EXAMPLES and LOCAL_MHA_BUILD_BENCHMARKS, whose programs "
                      "make the pictures")
endif()

set(docs_dir "${PROJECT_BINARY_DIR}")
file(STRINGS cmake/docs/public_headers.txt headers)
set(pages_py "${PROJECT_SOURCE_DIR}/cmake/docs/pages.py")
execute_process(COMMAND "${Python3_EXECUTABLE}" -B "${pages_py}" --list OUTPUT_VARIABLE pages
                OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" pages "${pages}")
list(TRANSFORM pages PREPEND "${PROJECT_SOURCE_DIR}/")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${pages_py}")
execute_process(COMMAND "${Python3_EXECUTABLE}" -B "${pages_py}" --guide OUTPUT_FILE "${docs_dir}/guide.markdown"
                COMMAND_ERROR_IS_FATAL ANY)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/README.md")
set(sources ${pages} "${docs_dir}/guide.markdown" "${PROJECT_SOURCE_DIR}/cmake/docs/namespaces.dox")
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
# Doxygen says nothing of undocumented classes that it hides, and shows private ones, too, if it hides none: what is
# undocumented is looked for without a site.
file(WRITE "${docs_dir}/Doxyfile.undocumented"
     "@INCLUDE = \"${docs_dir}/Doxyfile\"\nHIDE_UNDOC_CLASSES = NO\nGENERATE_HTML = NO\nGENERATE_XML = YES\n"
     "XML_PROGRAMLISTING = NO\nWARN_LOGFILE = \"${docs_dir}/warnings_undocumented.txt\"\n")

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

# The pictures that are kept beside the pages are what the programs draw: made here, and compared by a test.
set(made "${docs_dir}/pictures")
set(kept "${PROJECT_SOURCE_DIR}/cmake/docs/pictures")
add_custom_target(
  pictures
  COMMAND local_mha_pictures "${made}" --peers "${PROJECT_SOURCE_DIR}/benchmarks/peers/published.json"
  COMMAND attention_map head "${made}/head.png" --weights "${PROJECT_SOURCE_DIR}/examples/data/shakespeare.safetensors"
          --layer 3 --head 1 --text "To be, or not to be: that is the question" --cell-size 16
  COMMENT "The pictures of the README and the guide"
  VERBATIM)
# Puts them in the place of those that are kept.
add_custom_target(update_pictures COMMAND ${CMAKE_COMMAND} -E copy_directory "${made}" "${kept}")
add_dependencies(update_pictures pictures)

add_custom_target(
  docs
  ${copy_mathjax}
  COMMAND ${CMAKE_COMMAND} -E copy_directory "${kept}" "${docs_dir}"
  COMMAND ${CMAKE_COMMAND} -E copy_if_different "${PROJECT_SOURCE_DIR}/examples/data/own_sources_loss.png"
          "${PROJECT_SOURCE_DIR}/examples/data/own_sources_loss_4_streams.png" "${docs_dir}"
  COMMAND ${DOXYGEN_EXECUTABLE} "${docs_dir}/Doxyfile"
  COMMAND ${DOXYGEN_EXECUTABLE} "${docs_dir}/Doxyfile.undocumented"
  COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/undocumented.py" "${docs_dir}"
          "${PROJECT_SOURCE_DIR}/include" ${headers}
  COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_links.py" "${docs_dir}"
  COMMENT "The site in ${docs_dir}"
  VERBATIM)

add_dependencies(docs pictures)

enable_testing()
file(GLOB kept_pictures CONFIGURE_DEPENDS RELATIVE "${kept}" "${kept}/*")
foreach(picture IN LISTS kept_pictures)
  # The colors of a head's probabilities may differ by a rounding on another processor.
  if(NOT picture STREQUAL "head.png")
    add_test(NAME docs.picture.${picture}
             COMMAND ${CMAKE_COMMAND} -E compare_files "${made}/${picture}" "${kept}/${picture}")
  endif()
endforeach()
add_test(NAME docs.pages COMMAND ${Python3_EXECUTABLE} -B "${pages_py}" --check)
add_test(NAME docs.undocumented
         COMMAND ${Python3_EXECUTABLE} -B "${PROJECT_SOURCE_DIR}/cmake/docs/undocumented_test.py" "${DOXYGEN_EXECUTABLE}"
                 "${docs_dir}/Doxyfile.undocumented")
add_test(NAME docs.mutants COMMAND ${Python3_EXECUTABLE} -B "${PROJECT_SOURCE_DIR}/cmake/mutants/mutants.py" --check
         --build "${CMAKE_CURRENT_BINARY_DIR}/mutants")
find_program(LOCAL_MHA_CHROMIUM NAMES chromium chromium-browser google-chrome)
if(LOCAL_MHA_CHROMIUM)
  add_test(NAME docs.browser
           COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_in_browser.py" "${LOCAL_MHA_CHROMIUM}"
                   "${docs_dir}")
endif()
add_test(NAME docs.links COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/docs/check_links.py" "${docs_dir}")
