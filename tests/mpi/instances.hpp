// SPDX-License-Identifier: MIT
// What takes long to compile is compiled once, in instances.cpp.
#pragma once

#include <local_mha/mpi.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

extern template class LocalMHA<double>;
extern template class Encoder<double>;
extern template class LocalTransformer<double>;

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
