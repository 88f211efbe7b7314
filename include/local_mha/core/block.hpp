// SPDX-License-Identifier: MIT
/// \file
/// Blocks: `Lanes<Scalar>::count` adjoining positions, transposed, `[channel][position]`.
///
/// Every step of the layer works on blocks, so that what is done per position (a norm, a rotation,
/// a softmax) is vertical, and a block that one matrix product makes is the operand of the next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/transpose.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Positions in a block.
template <typename Scalar>
inline constexpr Index block_rows = Lanes<Scalar>::count;

/// Memory that starts at a cache line. Much of it is asked for in huge pages: blocks far apart, as
/// in gradients, would each miss the cache of the page table.
template <typename Scalar>
struct CacheLineAllocator {
  using value_type = Scalar;

  CacheLineAllocator() = default;
  template <typename Other>
  CacheLineAllocator(const CacheLineAllocator<Other>&) {}

  Scalar* allocate(std::size_t n) {
    void* memory = ::operator new(n * sizeof(Scalar), alignment(n));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Advice: where there are no huge pages, the alignment is all that it costs.
    if (is_much(n)) madvise(memory, n * sizeof(Scalar), MADV_HUGEPAGE);
#endif
    return static_cast<Scalar*>(memory);
  }
  void deallocate(Scalar* memory, std::size_t n) { ::operator delete(memory, alignment(n)); }
  /// Numbers without a value are not touched: the thread that writes them first does that.
  template <typename T>
  void construct(T* at) {
    ::new (static_cast<void*>(at)) T;
  }
  template <typename T, typename... Values>
  void construct(T* at, Values&&... values) {
    ::new (static_cast<void*>(at)) T(std::forward<Values>(values)...);
  }
  friend bool operator==(const CacheLineAllocator&, const CacheLineAllocator&) { return true; }

 private:
  static constexpr std::size_t huge_page = std::size_t{1} << 21;
  static bool is_much(std::size_t n) { return n >= 2 * huge_page / sizeof(Scalar); }
  static std::align_val_t alignment(std::size_t n) {
    return std::align_val_t{is_much(n) ? huge_page : 64};
  }
};

/// Buffers for blocks.
template <typename Scalar>
using BlockBuffer = std::vector<Scalar, CacheLineAllocator<Scalar>>;

/// Zero at first.
template <typename Scalar>
BlockBuffer<Scalar> make_block_buffer(Index size) {
  return BlockBuffer<Scalar>(static_cast<std::size_t>(size), Scalar(0));
}

/// Makes room for `size` numbers without values, in the memory that is there if it is enough: new
/// memory is slow where it is large.
template <typename Scalar>
void resize_without_values(BlockBuffer<Scalar>& buffer, Index size) {
  const auto n = static_cast<std::size_t>(size);
  // What is there need not be moved, nor stay while there is more.
  if (n > buffer.capacity()) buffer = BlockBuffer<Scalar>();
  buffer.resize(n);
}

namespace detail {

// Makes the first `number` of a workspace's rooms such that serve: those that do move to the front,
// and only where they are too few, others make way for new ones.
template <typename Room, typename Serves, typename Make>
void provide(std::vector<Room>& rooms, Index number, Serves&& serves, Make&& make) {
  const auto others = std::partition(rooms.begin(), rooms.end(), serves);
  if (others - rooms.begin() >= number) return;
  rooms.erase(others, rooms.end());
  while (static_cast<Index>(rooms.size()) < number) rooms.push_back(make());
}

}  // namespace detail

/// Rows of numbers that lie `stride` apart, of which `first` is the one that is called 0. One type
/// for all of them, so that what transposes them is compiled once.
template <typename T>
struct StridedRows {
  T* data;
  Index stride;
  Index first = 0;

  T* operator()(Index r) const { return data + (first + r) * stride; }
};
// clang before 17 does not deduce aggregates.
template <typename T>
StridedRows(T*, Index) -> StridedRows<T>;
template <typename T>
StridedRows(T*, Index, Index) -> StridedRows<T>;

/// Transposes `rows` positions of `channels` values into a block; the remaining positions become 0.
/// \param row `row(r)` points to the `channels` values of position `r`, `0 <= r < rows`
/// \param block `[channels][block_rows]`, aligned
template <typename Scalar, typename RowOf>
LOCAL_MHA_FLATTEN void load_block(Index channels, Index rows, RowOf&& row, Scalar* block) {
  using L = Lanes<Scalar>;
  // Whole packets of channels through registers, the rest one by one.
  const Index whole = L::vectorized ? channels / L::packet_size * L::packet_size : 0;
  if constexpr (L::vectorized) {
    for (Index c = 0; c < whole; c += L::packet_size) {
      const auto from = [&](Index r) { return row(r) + c; };
      if (rows == L::count)
        transpose_in(Index{L::count}, from, block + c * L::count);
      else
        transpose_in(rows, from, block + c * L::count);
    }
  }
  for (Index c = whole; c < channels; ++c)
    for (Index r = 0; r < L::count; ++r) block[c * L::count + r] = r < rows ? row(r)[c] : Scalar(0);
}

/// Transposes the first `rows` positions of a block into rows of `channels` values.
/// \param row `row(r)` points to the room for position `r`
template <typename Scalar, typename RowOf>
LOCAL_MHA_FLATTEN void store_block(Index channels, Index rows, const Scalar* block, RowOf&& row) {
  using L = Lanes<Scalar>;
  const Index whole = L::vectorized ? channels / L::packet_size * L::packet_size : 0;
  if constexpr (L::vectorized) {
    for (Index c = 0; c < whole; c += L::packet_size)
      transpose_out(rows, block + c * L::count, [&](Index r) { return row(r) + c; });
  }
  for (Index c = whole; c < channels; ++c)
    for (Index r = 0; r < rows; ++r) row(r)[c] = block[c * L::count + r];
}

/// Positions `[begin, end)` of a block.
struct LaneRange {
  int begin;
  int end;
};

/// Makes lanes outside of a range 0: what is summed over a block's positions counts those there
/// are, whatever the others have become.
/// \param block `[channels][block_rows]`
template <typename Scalar>
void clear_other_lanes(Index channels, LaneRange lanes, Scalar* block) {
  using L = Lanes<Scalar>;
  if (lanes.begin == 0 && lanes.end == L::count) return;
  for (Index c = 0; c < channels; ++c, block += L::count)
    select_lanes(lanes.begin, lanes.end, L::load(block), L::zero()).store(block);
}

/// load_block() for some lanes of a block: the others become anything.
/// \param row `row(r)` points to the values of position `r` of the lanes
template <typename Scalar, typename RowOf>
LOCAL_MHA_FLATTEN void load_lanes(Index channels, LaneRange lanes, RowOf&& row, Scalar* block) {
  using L = Lanes<Scalar>;
  if (lanes.end - lanes.begin == 1) {
    const Scalar* values = row(lanes.begin);
    for (Index c = 0; c < channels; ++c) {
      L::zero().store(block + c * L::count);
      block[c * L::count + lanes.begin] = values[c];
    }
  } else {
    load_block(
        channels, lanes.end, [&](Index r) { return row((std::max<Index>)(r, lanes.begin)); },
        block);
  }
}

/// store_block() for some lanes of a block.
template <typename Scalar, typename RowOf>
LOCAL_MHA_FLATTEN void store_lanes(Index channels, LaneRange lanes, const Scalar* block,
                                   RowOf&& row) {
  if (lanes.begin == 0 && lanes.end > 1) {
    store_block(channels, lanes.end, block, row);
  } else {
    for (Index r = lanes.begin; r < lanes.end; ++r) {
      Scalar* to = row(r);
      for (Index c = 0; c < channels; ++c) to[c] = block[c * block_rows<Scalar> + r];
    }
  }
}

/// Takes rows through `apply` as blocks.
/// \param x, x_stride `[rows, channels]`, and from row to row
/// \param y `[rows, out_channels]`
/// \param together blocks that one call of `apply` gets at most
/// \param in, out room for as many blocks
/// \param apply `apply(blocks, in, out)` makes `out` `[blocks][out_channels][block_rows]` of `in`
///        `[blocks][channels][block_rows]`
template <typename Scalar, typename Apply>
void map_rows(Index rows, Index channels, const Scalar* x, Index x_stride, Index out_channels,
              Scalar* y, Index together, Scalar* in, Scalar* out, Apply&& apply) {
  constexpr Index count = block_rows<Scalar>;
  for (Index begin = 0; begin < rows; begin += together * count) {
    const Index blocks = (std::min)(together, ceil_div(rows - begin, count));
    const auto rows_of = [&](Index b) { return (std::min)(count, rows - begin - b * count); };
    for (Index b = 0; b < blocks; ++b) {
      load_block(channels, rows_of(b), StridedRows{x, x_stride, begin + b * count},
                 in + b * channels * count);
    }
    apply(blocks, in, out);
    for (Index b = 0; b < blocks; ++b) {
      store_block(out_channels, rows_of(b), out + b * out_channels * count,
                  StridedRows{y, out_channels, begin + b * count});
    }
  }
}

/// The same of a matrix.
/// \param x `[rows, channels]`
/// \return `[rows, out_channels]`
template <typename Scalar, typename Apply>
RowMatrix<Scalar> map_blocks(const Eigen::Ref<const RowMatrix<Scalar>>& x, Index out_channels,
                             Index together, Apply&& apply) {
  constexpr Index count = block_rows<Scalar>;
  RowMatrix<Scalar> y(x.rows(), out_channels);
  auto in = make_block_buffer<Scalar>(x.cols() * count * together);
  auto out = make_block_buffer<Scalar>(out_channels * count * together);
  map_rows(x.rows(), x.cols(), x.data(), x.outerStride(), out_channels, y.data(), together,
           in.data(), out.data(), apply);
  return y;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
