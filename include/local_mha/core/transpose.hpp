// SPDX-License-Identifier: MIT
/// \file
/// Packets of positions to Lanes of a channel, and back.
#pragma once

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

// The attributes of a raw packet type do not belong to its identity as a template argument.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Transposes as many channels as a packet holds of `rows` positions into `to`, `[channel][lane]`;
/// the remaining lanes become 0.
/// \param row `row(r)` points to the values of position `r`, `0 <= r < rows <= count`
/// \param to aligned
template <typename Scalar, typename RowOf>
LOCAL_MHA_INLINE void transpose_in(Index rows, RowOf&& row, Scalar* to) {
  using L = Lanes<Scalar>;
  using Packet = typename L::Packet;
  constexpr int n = L::packet_size;
  LOCAL_MHA_UNROLL for (int p = 0; p < L::packets; ++p) {
    Eigen::internal::PacketBlock<Packet, n> tile;
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) {
      tile.packet[r] = p * n + r < rows ? Eigen::internal::ploadu<Packet>(row(p * n + r))
                                        : Eigen::internal::pset1<Packet>(Scalar(0));
    }
    Eigen::internal::ptranspose(tile);
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r)
        Eigen::internal::pstore<Scalar>(to + r * L::count + p * n, tile.packet[r]);
  }
}

/// The reverse of transpose_in().
template <typename Scalar, typename RowOf>
LOCAL_MHA_INLINE void transpose_out(Index rows, const Scalar* from, RowOf&& row) {
  using L = Lanes<Scalar>;
  using Packet = typename L::Packet;
  constexpr int n = L::packet_size;
  LOCAL_MHA_UNROLL for (int p = 0; p < L::packets; ++p) {
    Eigen::internal::PacketBlock<Packet, n> tile;
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) tile.packet[r] =
        Eigen::internal::pload<Packet>(from + r * L::count + p * n);
    Eigen::internal::ptranspose(tile);
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) {
      if (p * n + r < rows) Eigen::internal::pstoreu<Scalar>(row(p * n + r), tile.packet[r]);
    }
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
