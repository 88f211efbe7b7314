// SPDX-License-Identifier: MIT
// Every header, and of the main templates every member.
#include "all_headers.hpp"

template class local_mha::LocalAttention<float>;
template class local_mha::LocalMHA<float>;
template class local_mha::LocalTransformer<float>;
template class local_mha::LocalMHA<double>;
