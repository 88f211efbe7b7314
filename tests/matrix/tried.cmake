# SPDX-License-Identifier: MIT
# Says which rows or ways were tried and which were not, and fails if none was:
#
#   cmake -DNAMES=one,other -DFOLDER=folder -DSTRICT=ON|OFF -P tried.cmake
#
# FOLDER has a folder for each that ran, with a file `skipped` where it could not be tried. STRICT: what was
# not tried is a failure, too. What was tried and failed is told by its own test.
string(REPLACE "," ";" names "${NAMES}")
set(tried 0)
set(missing "")
foreach(name IN LISTS names)
  set(how "")
  if(NOT IS_DIRECTORY "${FOLDER}/${name}")
    set(how "not run")
    list(APPEND missing ${name})
  elseif(EXISTS "${FOLDER}/${name}/skipped")
    file(STRINGS "${FOLDER}/${name}/skipped" how)
    list(APPEND missing ${name})
  else()
    math(EXPR tried "${tried} + 1")
    if(EXISTS "${FOLDER}/${name}/how")
      file(STRINGS "${FOLDER}/${name}/how" how)
    endif()
    list(PREPEND how "tried")
    list(JOIN how ", " how)
  endif()
  message(STATUS "${name}: ${how}")
endforeach()
list(LENGTH names all)
list(LENGTH missing number)
message(STATUS "${tried} of ${all} were tried, ${number} were not: ${missing}")
if(tried EQUAL 0 OR (STRICT AND missing))
  message(FATAL_ERROR "${number} of ${all} were not tried: ${missing}")
endif()
