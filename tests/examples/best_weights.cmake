# SPDX-License-Identifier: MIT
# A model that learns its text by heart gets worse on what it has not seen. The file holds the weights
# that were best there:
#   cmake -D PROGRAM=train_language_model -D SCORE=language_model -D TEXT=path -D FOLDER=path
#         -P best_weights.cmake
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${FOLDER}")
file(READ "${TEXT}" text)
string(SUBSTRING "${text}" 0 1200 text)
string(SUBSTRING "${text}" 1080 120 tail)
file(WRITE "${FOLDER}/text.txt" "${text}")
file(WRITE "${FOLDER}/tail.txt" "${tail}")
execute_process(
  COMMAND "${PROGRAM}" "${FOLDER}/text.txt" --out "${FOLDER}/model.safetensors" --dim 48 --depth 2
          --heads 2 --dim-head 16 --window 16 --seqlen 32 --batch 16 --steps 200 --validate-every 20
          --learning-rate 1e-2
  RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
message("${out}${err}")
if(NOT status EQUAL 0)
  message(FATAL_ERROR "The training ended with ${status}")
endif()

# millionths(VARIABLE number): CMake computes with whole numbers.
function(millionths variable number)
  if(NOT number MATCHES "^([0-9]+)[.]?([0-9]*)")
    message(FATAL_ERROR "Expected a number, got ${number}")
  endif()
  set(whole "${CMAKE_MATCH_1}")
  string(SUBSTRING "${CMAKE_MATCH_2}000000" 0 6 fraction)
  math(EXPR value "${whole} * 1000000 + 1${fraction} - 1000000")
  set(${variable} ${value} PARENT_SCOPE)
endfunction()

file(STRINGS "${FOLDER}/model.csv" rows REGEX "^[0-9]+(,[0-9.e-]+)+$")
set(best "")
foreach(row IN LISTS rows)
  string(REGEX REPLACE "^.*," "" loss "${row}")
  millionths(last "${loss}")
  if(best STREQUAL "" OR last LESS best)
    set(best ${last})
  endif()
endforeach()
list(LENGTH rows validations)
if(NOT validations EQUAL 10)
  message(FATAL_ERROR "Expected 10 validations in the table, got ${validations}")
endif()
execute_process(COMMAND "${SCORE}" score "${FOLDER}/model.safetensors" "${FOLDER}/tail.txt"
                OUTPUT_VARIABLE out COMMAND_ERROR_IS_FATAL ANY)
millionths(score "${out}")
math(EXPR past_best "${last} - ${best}")
math(EXPR error "${score} - ${best}")
message("best ${best}, last ${last}, of the file ${score} millionths of a bit")
if(past_best LESS 10000)
  message(FATAL_ERROR "Expected the last validation to be worse than the best")
endif()
if(error GREATER 20 OR error LESS -20)
  message(FATAL_ERROR "Expected the file to hold the best weights")
endif()
