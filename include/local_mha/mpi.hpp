// SPDX-License-Identifier: MIT
/// \file
/// Sequences over many machines: link local_mha::mpi.
#pragma once

#include <local_mha/mpi/attention.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/encoder.hpp>
#include <local_mha/mpi/mha.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/mpi/sum.hpp>
#include <local_mha/mpi/transformer.hpp>
