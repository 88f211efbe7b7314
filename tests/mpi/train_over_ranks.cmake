# SPDX-License-Identifier: MIT
# 50 steps of a training in double on several ranks give the losses of one process to 1e-10, also
# where they stop in the middle and go on from one another's checkpoint:
#   cmake -D MPIRUN=mpirun -D PROGRAM=train_language_model -D COMPARE=compare_losses -D TEXT=path
#         -D FOLDER=path -P train_over_ranks.cmake
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${FOLDER}")
set(small --double --dim 24 --depth 2 --heads 2 --dim-head 8 --window 8 --seqlen 50 --batch 4
    --warmup 5 --validate-every 25 --seed 5 --threads 1)

function(train ranks name)
  execute_process(
    COMMAND "${MPIRUN}" -n ${ranks} "${PROGRAM}" "${TEXT}" --out "${FOLDER}/${name}.safetensors"
            ${small} ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${name} on ${ranks} ranks ended with ${status}: ${out}${err}")
  endif()
  string(REGEX MATCHALL "bits per byte in validation" told "${out}")
  list(LENGTH told number)
  if(NOT number EQUAL 1)
    message(FATAL_ERROR "${name}: expected one rank to tell the result, got '${out}'")
  endif()
endfunction()
function(compare name other tolerance steps)
  execute_process(COMMAND "${COMPARE}" "${FOLDER}/${name}.checkpoint.safetensors"
                          "${FOLDER}/${other}.checkpoint.safetensors" ${tolerance} ${steps}
                  RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${name} and ${other}: ${out}${err}")
  endif()
  message(STATUS "${name} and ${other}: ${out}")
endfunction()

# With dropout, the ranks hold each sequence together; groups drop something else.
train(1 one --steps 50 --dropout 0.1)
train(4 four --steps 50 --dropout 0.1)
compare(one four 1e-10 50)
train(1 plain --steps 50)
train(4 groups --steps 50 --ranks-per-sequence 2)
compare(plain groups 1e-10 50)
# A checkpoint of ranks is one of a process, and the other way round.
file(COPY_FILE "${FOLDER}/one.checkpoint.safetensors" "${FOLDER}/on.checkpoint.safetensors")
train(3 on --steps 60 --dropout 0.1 --resume)
train(1 four --steps 60 --dropout 0.1 --resume)
compare(on four 1e-10 50)

# In products of bfloat16, some of which are rounded to the other side.
list(REMOVE_ITEM small --double)
train(1 rounded --steps 20 --arithmetic bfloat16)
train(3 rounded_ranks --steps 20 --arithmetic bfloat16)
compare(rounded rounded_ranks 3e-3 20)
list(APPEND small --double)

# What is wrong is said once; what one rank alone finds wrong ends the others. The status is that of
# one process.
execute_process(
  COMMAND "${MPIRUN}" -n 3 "${PROGRAM}" "${TEXT}" --out "${FOLDER}/none.safetensors" ${small}
          --ranks-per-sequence 2 RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
if(NOT status EQUAL 2 OR NOT err MATCHES "--ranks-per-sequence: expected a number that divides the ranks, 3")
  message(FATAL_ERROR "Two ranks of three: ${status}, '${err}'")
endif()
set(arguments --out "${FOLDER}/none.safetensors" ${small})
execute_process(
  COMMAND "${MPIRUN}" -n 1 "${PROGRAM}" "${TEXT}" ${arguments} : -n 1 "${PROGRAM}" "${FOLDER}/nowhere"
          ${arguments} RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err TIMEOUT 60)
if(NOT status EQUAL 2 OR NOT err MATCHES "rank 1 of 2: [^\n]*nowhere[^\n]*all ranks end")
  message(FATAL_ERROR "A text that one rank has not: ${status}, '${err}'")
endif()
