# SPDX-License-Identifier: MIT
# A training that is stopped at any moment and resumed ends with the same bits as one that is not:
#   cmake -D PROGRAM=train_language_model -D TEXT=path -D FOLDER=path -D SIGNAL=KILL|INT
#         -P train_and_stop.cmake
find_program(timeout_program timeout REQUIRED)
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${FOLDER}")
set(small --dim 24 --depth 2 --heads 2 --dim-head 8 --window 8 --seqlen 32 --batch 6 --steps 150
    --warmup 5 --validate-every 7 --dropout 0.1 --seed 5)

execute_process(COMMAND "${PROGRAM}" "${TEXT}" --out "${FOLDER}/whole.safetensors" ${small}
                        --threads 1 RESULT_VARIABLE status ERROR_VARIABLE err)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "The training that is not stopped ended with ${status}: ${err}")
endif()

# What a run that was killed while it wrote leaves behind goes away; what is not its own stays.
file(WRITE "${FOLDER}/stopped.csv.0123456789abcdef.tmp" "")
file(WRITE "${FOLDER}/stopped.csv.notes.tmp" "")

# Each attempt may take longer than the one before, so that some day one comes to the end.
set(stops 0)
foreach(attempt RANGE 1 200)
  math(EXPR milliseconds "20 + 7 * ${attempt}")
  string(LENGTH "${milliseconds}" digits)
  math(EXPR zeros "3 - ${digits}")
  if(zeros GREATER 0)
    string(REPEAT 0 ${zeros} zeros)
    set(duration "0.${zeros}${milliseconds}")
  elseif(digits EQUAL 3)
    set(duration "0.${milliseconds}")
  else()
    set(duration 1)
  endif()
  set(resume "")
  if(EXISTS "${FOLDER}/stopped.checkpoint.safetensors")
    set(resume --resume)
  endif()
  execute_process(COMMAND "${timeout_program}" --preserve-status -s ${SIGNAL} ${duration} "${PROGRAM}"
                          "${TEXT}" --out "${FOLDER}/stopped.safetensors" ${small} --threads 2
                          ${resume} RESULT_VARIABLE status ERROR_VARIABLE err OUTPUT_QUIET)
  if(status EQUAL 0)
    break()
  endif()
  if(SIGNAL STREQUAL INT AND status EQUAL 130 AND NOT err MATCHES "Stopped")
    message(FATAL_ERROR "Expected a word about how to go on, got: ${err}")
  endif()
  if(status EQUAL 2)
    message(FATAL_ERROR "Attempt ${attempt} failed: ${err}")
  endif()
  math(EXPR stops "${stops} + 1")
endforeach()
message("${stops} stops")
if(NOT status EQUAL 0 OR stops LESS 2)
  message(FATAL_ERROR "Expected at least 2 stops and an end, got ${stops} stops and ${status}")
endif()
file(GLOB temporaries RELATIVE "${FOLDER}" "${FOLDER}/*.tmp")
if(NOT temporaries STREQUAL "stopped.csv.notes.tmp")
  message(FATAL_ERROR "Expected stopped.csv.notes.tmp alone, got ${temporaries}")
endif()
foreach(file safetensors checkpoint.safetensors csv png)
  file(SHA256 "${FOLDER}/whole.${file}" whole)
  file(SHA256 "${FOLDER}/stopped.${file}" stopped)
  if(NOT whole STREQUAL stopped)
    message(FATAL_ERROR "whole.${file} and stopped.${file} differ")
  endif()
endforeach()
