# SPDX-License-Identifier: MIT
# A training that is stopped at any moment and resumed ends with the same bits as one that is not:
#   cmake -D PROGRAM=train_language_model -D SEND_SIGNAL=send_signal -D TEXT=path -D FOLDER=path
#         -D SIGNAL=KILL|INT -P train_and_stop.cmake
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${FOLDER}")
set(small --dim 24 --depth 2 --heads 2 --dim-head 8 --window 8 --seqlen 32 --batch 2 --steps 125
    --warmup 5 --validate-every 7 --dropout 0.1 --seed 5)

execute_process(COMMAND "${PROGRAM}" "${TEXT}" --out "${FOLDER}/whole.safetensors" ${small}
                        --threads 1 RESULT_VARIABLE status ERROR_VARIABLE err)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "The training that is not stopped ended with ${status}: ${err}")
endif()

# What a run that was killed while it wrote leaves behind goes away; what is not its own stays.
file(WRITE "${FOLDER}/stopped.csv.0123456789abcdef.tmp" "")
file(WRITE "${FOLDER}/stopped.csv.notes.tmp" "")
file(WRITE "${FOLDER}/stopped.png.tmp" "")

# The first one at once, before there is anything to go on from; each of the others after one to
# three validations and a part of the time to the next one, so that every attempt comes further.
set(stops 0)
foreach(attempt RANGE 0 40)
  set(validations 0)
  if(attempt GREATER 0)
    math(EXPR validations "1 + ${attempt} % 3")
  endif()
  math(EXPR percent "37 * ${attempt} % 100")
  set(resume "")
  if(EXISTS "${FOLDER}/stopped.checkpoint.safetensors")
    set(resume --resume)
  endif()
  execute_process(COMMAND "${SEND_SIGNAL}" ${SIGNAL} "tokens per second" ${validations} ${percent}
                          "${PROGRAM}" "${TEXT}" --out "${FOLDER}/stopped.safetensors" ${small}
                          --threads 2 ${resume} RESULT_VARIABLE status OUTPUT_VARIABLE out)
  if(status EQUAL 0)
    break()
  endif()
  set(killed FALSE)
  if(out MATCHES "ended by signal")
    set(killed TRUE)
  endif()
  if(SIGNAL STREQUAL KILL OR (attempt EQUAL 0 AND killed))
    # At once may be before the program has begun.
    if(NOT killed)
      message(FATAL_ERROR "Attempt ${attempt} failed: ${out}")
    endif()
  elseif(NOT status EQUAL 130 OR NOT out MATCHES "Stopped. Go on with")
    message(FATAL_ERROR "Attempt ${attempt}: expected status 130 and a word about how to go on, got "
                        "${status} and: ${out}")
  elseif(NOT EXISTS "${FOLDER}/stopped.checkpoint.safetensors")
    message(FATAL_ERROR "Attempt ${attempt} left no checkpoint to go on from")
  endif()
  math(EXPR stops "${stops} + 1")
endforeach()
message("${stops} stops")
if(NOT status EQUAL 0 OR stops LESS 5)
  message(FATAL_ERROR "Expected at least 5 stops and an end, got ${stops} stops and ${status}")
endif()
file(GLOB temporaries RELATIVE "${FOLDER}" "${FOLDER}/*.tmp")
list(SORT temporaries)
if(NOT temporaries STREQUAL "stopped.csv.notes.tmp;stopped.png.tmp")
  message(FATAL_ERROR "Expected stopped.csv.notes.tmp and stopped.png.tmp alone, got ${temporaries}")
endif()
foreach(file safetensors checkpoint.safetensors csv png)
  file(SHA256 "${FOLDER}/whole.${file}" whole)
  file(SHA256 "${FOLDER}/stopped.${file}" stopped)
  if(NOT whole STREQUAL stopped)
    message(FATAL_ERROR "whole.${file} and stopped.${file} differ")
  endif()
endforeach()
