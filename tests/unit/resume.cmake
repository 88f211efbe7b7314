# SPDX-License-Identifier: MIT
# cmake -D PROGRAM=path -D FOLDER=path -P resume.cmake: three processes of resume.cpp, the second of
# which is killed.
set(state "${FOLDER}/resume.state")
set(whole "${FOLDER}/resume.whole")
set(resumed "${FOLDER}/resume.resumed")
file(REMOVE "${state}" "${whole}" "${resumed}")
execute_process(COMMAND "${PROGRAM}" whole "${whole}" COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${PROGRAM}" save "${state}" RESULT_VARIABLE end)
if(end EQUAL 0 OR end EQUAL 1 OR end EQUAL 2)
  message(FATAL_ERROR "Expected the process to be killed, got status ${end}")
endif()
execute_process(COMMAND "${PROGRAM}" load "${state}" "${resumed}" COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${CMAKE_COMMAND}" -E compare_files "${whole}" "${resumed}"
                COMMAND_ERROR_IS_FATAL ANY)
