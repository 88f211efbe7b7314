# SPDX-License-Identifier: MIT
# Runs a program and checks how it ends and what it says:
#   cmake -D STATUS=0 [-D STDIN=path] [-D STDOUT=regex] [-D STDERR=regex] [-D REPEATS=ON]
#         [-D FILE=path] -P run_program.cmake -- program argument...
# REPEATS: a second run must write the same to stdout. FILE: what it must have written, a
# picture if its name ends in .png.
foreach(index RANGE 1 ${CMAKE_ARGC})
  if(CMAKE_ARGV${index} STREQUAL "--")
    set(command "")
  elseif(DEFINED command AND index LESS CMAKE_ARGC)
    list(APPEND command "${CMAKE_ARGV${index}}")
  endif()
endforeach()

if(FILE)
  file(REMOVE "${FILE}")
endif()
if(STDIN)
  set(input INPUT_FILE "${STDIN}")
endif()
execute_process(COMMAND ${command} ${input} RESULT_VARIABLE status OUTPUT_VARIABLE out
                ERROR_VARIABLE err)
message("${out}${err}")
if(NOT status STREQUAL STATUS)
  message(FATAL_ERROR "Expected exit status ${STATUS}, got ${status}")
endif()
if(DEFINED STDOUT AND NOT out MATCHES "${STDOUT}")
  message(FATAL_ERROR "Expected on stdout: ${STDOUT}")
endif()
if(DEFINED STDERR AND NOT err MATCHES "${STDERR}")
  message(FATAL_ERROR "Expected on stderr: ${STDERR}")
endif()
if(REPEATS)
  execute_process(COMMAND ${command} OUTPUT_VARIABLE again ERROR_QUIET)
  if(NOT out STREQUAL again)
    message(FATAL_ERROR "Expected the same on stdout, got: ${again}")
  endif()
endif()
if(FILE)
  file(READ "${FILE}" signature LIMIT 8 HEX)
  if(FILE MATCHES "[.]png$" AND NOT signature STREQUAL "89504e470d0a1a0a")
    message(FATAL_ERROR "Expected a PNG file, got one that begins with ${signature}")
  endif()
endif()
