# SPDX-License-Identifier: MIT
# A training that has come to its end goes on with --resume and more --steps:
#   cmake -D PROGRAM=train_language_model -D DROP_TENSORS=drop_tensors -D TEXT=path -D FOLDER=path
#         -P train_longer.cmake
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${FOLDER}")
set(model "${FOLDER}/model")
set(older "${FOLDER}/older")

# train(path argument...): its messages in `err`.
function(train path)
  execute_process(COMMAND "${PROGRAM}" "${TEXT}" --out "${path}.safetensors" --dim 16 --depth 1
                          --heads 2 --dim-head 8 --window 8 --seqlen 32 --batch 4 --validate-every 10
                          --learning-rate 1e-3 --threads 1 ${ARGN}
                  RESULT_VARIABLE status ERROR_VARIABLE err OUTPUT_QUIET)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "The training with ${ARGN} ended with ${status}: ${err}")
  endif()
  set(err "${err}" PARENT_SCOPE)
endfunction()

train("${model}" --steps 20)
file(READ "${model}.csv" short)
execute_process(COMMAND "${DROP_TENSORS}" "${model}.checkpoint.safetensors"
                        "${older}.checkpoint.safetensors" history/learning_rate
                COMMAND_ERROR_IS_FATAL ANY)
train("${model}" --steps 40 --resume)
if(NOT err MATCHES "steps 20 to 40 in")
  message(FATAL_ERROR "Expected steps 20 to 40, got: ${err}")
endif()
file(READ "${model}.csv" long)
string(FIND "${long}" "${short}" begin)
if(NOT begin EQUAL 0)
  message(FATAL_ERROR "Expected what was done to stay as it was: ${short} got ${long}")
endif()
# The warm-up is that of the beginning; the rate goes down to a tenth of the highest, once more: from
# step 21, which is where the longer schedule has it, 1e-3/10 + 9e-4*(1 + cos(pi*(20 - 2)/(40 - 2)))/2.
foreach(row "\n1,0.0005," "\n3,0.001," "\n20,0.000106836" "\n21,0.00058716" "\n40,0.000101536")
  if(NOT long MATCHES "${row}")
    message(FATAL_ERROR "Expected${row}... in: ${long}")
  endif()
endforeach()

# A checkpoint does not need to hold the rates of a single schedule.
train("${older}" --steps 40 --resume)
file(READ "${older}.csv" of_older)
if(NOT of_older STREQUAL long)
  message(FATAL_ERROR "Expected ${long} got ${of_older}")
endif()

# The checkpoint knows its steps.
train("${model}" --resume)
if(NOT err MATCHES "steps 40 to 40 in")
  message(FATAL_ERROR "Expected nothing more to do, got: ${err}")
endif()
