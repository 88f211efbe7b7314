// SPDX-License-Identifier: MIT
#include <local_mha/mpi.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

template class LocalMHA<double>;
template class Encoder<double>;
template class LocalTransformer<double>;

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
