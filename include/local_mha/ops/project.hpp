// SPDX-License-Identifier: MIT
/// \file
/// Products of a packed weight and rows: `y = x·Wᵀ`, by blocks of rows or of a single one.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/multiply.hpp>
#include <local_mha/ops/packed_weight.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

// Rows of a group whose panels are read as they lie.
template <int Blocks, typename Scalar>
void project_panels(const PackedWeight<Scalar>& weight, Index group, Index row_begin, Index row_end,
                    const Scalar* x, Index x_stride, Scalar* const (&y)[Blocks]) {
  using L = Lanes<Scalar>;
  constexpr int rows = Tiling<Scalar>::rows;
  // A chunk of the weight comes from the last cache when it passes first.
  constexpr Ahead ahead = Tiling<Scalar>::may_fetch(Blocks) ? Ahead{.a = 64, .x = 8} : Ahead{};
  const Scalar* from[Blocks];
  for (int b = 0; b < Blocks; ++b) from[b] = x + b * x_stride;
  for (Index row = row_begin; row < row_end; row += rows) {
    L acc[rows][Blocks];
    LOCAL_MHA_UNROLL for (int r = 0; r < rows; ++r) {
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b] = L::zero();
    }
    const Scalar* panel = weight.panel(group, row / rows);
    multiply<ahead>(weight.depth(), panel, 1, rows, from, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < rows; ++r) {
      if (row + r < weight.group_rows()) {
        LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b].store(y[b] +
                                                                          (row + r) * L::count);
      }
    }
  }
}

// project() of a weight whose panels are read as they lie.
template <typename Scalar, typename BlockOf>
void project_as_it_lies(const PackedWeight<Scalar>& weight, Index group, const Range& some_rows,
                        const Scalar* x, Index blocks, BlockOf&& y) {
  constexpr Index rows = Tiling<Scalar>::rows;
  constexpr Index together = Tiling<Scalar>::blocks;
  const Index x_stride = weight.depth() * block_rows<Scalar>;
  // A chunk of the weight stays in the second-level cache while all blocks pass it.
  constexpr Index chunk_bytes = 256 * 1024;
  const Index panel_bytes = weight.depth() * rows * static_cast<Index>(sizeof(Scalar));
  const Index chunk = (std::max<Index>)(1, chunk_bytes / (std::max<Index>)(1, panel_bytes)) * rows;
  for (Index row = some_rows.begin; row < some_rows.end; row += chunk) {
    const Index row_end = (std::min)(row + chunk, some_rows.end);
    Index b = 0;
    for (; b + together <= blocks; b += together) {
      Scalar* to[together];
      for (Index i = 0; i < together; ++i) to[i] = y(b + i);
      project_panels<together>(weight, group, row, row_end, x + b * x_stride, x_stride, to);
    }
    for (; b < blocks; ++b) {
      Scalar* to[1] = {y(b)};
      project_panels<1>(weight, group, row, row_end, x + b * x_stride, x_stride, to);
    }
  }
}

// `y[b][r] += Σ_c weight[c][r]·x[b][c]` for a micro-kernel's rows, of which `rows` are there.
// \param stride from column to column of the weight
// \param begins there is no y yet
// \param upcoming is fetched meanwhile, in depth / fetch_depth steps
inline constexpr Index fetch_depth = 64;
template <int Blocks, typename Scalar, typename Storage>
LOCAL_MHA_NOINLINE void project_unpacked(Index depth, const Scalar* weight, Index stride,
                                         Index rows, bool begins, const Scalar* (&x)[Blocks],
                                         Scalar* const (&y)[Blocks], Upcoming<Storage>& upcoming) {
  using L = Lanes<Scalar>;
  constexpr int most = Tiling<Scalar>::rows;
  constexpr Ahead ahead = Tiling<Scalar>::may_fetch(Blocks) ? Ahead{.x = 8} : Ahead{};
  L acc[most][Blocks];
  LOCAL_MHA_UNROLL for (int r = 0; r < most; ++r) {
    LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b] =
        begins || r >= rows ? L::zero() : L::load(y[b] + r * L::count);
  }
  for (Index left = depth; left > 0; left -= fetch_depth) {
    upcoming.fetch();
    multiply<ahead>((std::min)(left, fetch_depth), weight, 1, stride, x, acc);
    weight += fetch_depth * stride;
    for (int b = 0; b < Blocks; ++b) x[b] += fetch_depth * L::count;
  }
  LOCAL_MHA_UNROLL for (int r = 0; r < most; ++r) {
    if (r < rows) {
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b].store(y[b] + r * L::count);
    }
  }
}

/// Rows of a weight in 16 bits that lie together when they are unpacked: those of a micro-kernel,
/// or where no packet is as small, of a panel.
template <typename Scalar, typename Storage>
inline constexpr Index unpacked_rows =
    Tiling<Scalar>::rows >=
            int{Eigen::internal::unpacket_traits<typename Lanes<Scalar>::HalfPacket>::size}
        ? Index{Tiling<Scalar>::rows}
        : PackedWeight<Scalar, Storage>::panel_rows;

// Columns of a panel, as `[part][most_depth][unpacked_rows]`. If the depth is odd, one more may
// follow.
template <typename Scalar, typename Storage>
LOCAL_MHA_FLATTEN void unpack_panel(Index depth, const Storage* panel, Index most_depth,
                                    Scalar* to) {
  constexpr Index rows = unpacked_rows<Scalar, Storage>;
  constexpr Index panel_rows = PackedWeight<Scalar, Storage>::panel_rows;
  constexpr int together = side_by_side<Storage>;
  using P = Lanes<Scalar, static_cast<int>(Lanes<Scalar>::count / panel_rows)>;
  using Part = Lanes<Scalar, static_cast<int>(Lanes<Scalar>::count / rows)>;
  LOCAL_MHA_UNROLL_4 for (Index d = 0; d < depth; d += together) {
    P cols[together];
    load_side_by_side(panel, cols);
    LOCAL_MHA_UNROLL for (int i = 0; i < together; ++i) {
      Part parts[panel_rows / rows];
      static_assert(sizeof parts == sizeof cols[i]);
      std::memcpy(&parts, &cols[i], sizeof parts);
      LOCAL_MHA_UNROLL for (int part = 0; part < panel_rows / rows; ++part) parts[part].store(
          to + (part * most_depth + d + i) * rows);
    }
    panel += together * panel_rows;
  }
}

// project() of a weight in 16 bits: what all blocks pass is unpacked once.
template <typename Scalar, typename Storage, typename BlockOf>
void project_rounded(const PackedWeight<Scalar, Storage>& weight, Index group,
                     const Range& some_rows, const Scalar* x, Index blocks, BlockOf&& y) {
  constexpr Index most = Tiling<Scalar>::rows;
  constexpr Index rows = unpacked_rows<Scalar, Storage>;
  constexpr Index panel_rows = PackedWeight<Scalar, Storage>::panel_rows;
  constexpr int together = Tiling<Scalar>::blocks;
  // Those of a part take half of a first-level cache: rows of x pass from the second one meanwhile.
  constexpr Index most_depth = 16 * 1024 / (rows * static_cast<Index>(sizeof(Scalar)));
  alignas(64) Scalar unpacked[most_depth * panel_rows];
  const Index x_stride = weight.depth() * block_rows<Scalar>;
  for (Index row = some_rows.begin; row < some_rows.end; row += panel_rows) {
    const Storage* const panel = weight.panel(group, row / panel_rows);
    Range some{0, 0};
    do {
      some.end = (std::min)(some.begin + most_depth, weight.depth());
      const Index depth = some.end - some.begin;
      unpack_panel(depth, panel + some.begin * panel_rows, most_depth, unpacked);
      // What is unpacked next would be waited for.
      const bool ends = some.end == weight.depth();
      const Storage* const next = ends ? weight.panel_behind(panel) : panel + some.end * panel_rows;
      Upcoming<Storage> upcoming;
      upcoming.add(next, (ends ? (std::min)(most_depth, weight.depth())
                               : (std::min)(most_depth, weight.depth() - some.end)) *
                             panel_rows);
      upcoming.spread_over(ceil_div(depth, fetch_depth) * (panel_rows / most) *
                           (blocks / together + blocks % together));
      const auto pass = [&]<int Blocks>(Index b, Index r) {
        const Scalar* from[Blocks];
        Scalar* to[Blocks];
        for (int i = 0; i < Blocks; ++i) {
          from[i] = x + (b + i) * x_stride + some.begin * block_rows<Scalar>;
          to[i] = y(b + i) + (row + r) * block_rows<Scalar>;
        }
        project_unpacked<Blocks>(depth, unpacked + r / rows * rows * most_depth + r % rows, rows,
                                 weight.group_rows() - row - r, some.begin == 0, from, to,
                                 upcoming);
      };
      for (Index r = 0; r < panel_rows && row + r < weight.group_rows(); r += most) {
        Index b = 0;
        for (; b + together <= blocks; b += together) pass.template operator()<together>(b, r);
        for (; b < blocks; ++b) pass.template operator()<1>(b, r);
      }
      some.begin = some.end;
    } while (some.begin < weight.depth());
  }
}

}  // namespace detail

/// `y(b)[r] = Σ_c W[group·group_rows + r, c] · x(b)[c]` for blocks `0 <= b < blocks`.
/// \param some_rows those of the group that are computed, whole panels
/// \param x blocks `[weight.depth()][block_rows]`, one after the other
/// \param y `y(b)` points to block `b` of the result, `[group_rows][block_rows]`
template <typename Scalar, typename Storage, typename BlockOf>
void project(const PackedWeight<Scalar, Storage>& weight, Index group, const Range& some_rows,
             const Scalar* x, Index blocks, BlockOf&& y) {
  if constexpr (!std::is_same_v<Scalar, Storage>)
    return detail::project_rounded(weight, group, some_rows, x, blocks, y);
  else
    detail::project_as_it_lies(weight, group, some_rows, x, blocks, y);
}

/// The same for all rows of the group.
template <typename Scalar, typename Storage, typename BlockOf>
void project(const PackedWeight<Scalar, Storage>& weight, Index group, const Scalar* x,
             Index blocks, BlockOf&& y) {
  project(weight, group, {0, weight.group_rows()}, x, blocks, y);
}

/// Adds a bias to each position of a block.
/// \param bias `[channels]`
/// \param block `[channels][block_rows]`
template <typename Scalar>
void add_bias(Index channels, const Scalar* bias, Scalar* block) {
  using L = Lanes<Scalar>;
  for (Index c = 0; c < channels; ++c, block += L::count)
    (L::load(block) + L::broadcast(bias[c])).store(block);
}

namespace detail {

/// How project_lane() reads a panel: its rows at one column at a time, where they fill at least 32
/// bytes or a packet, else at as many columns as do.
template <typename Scalar, typename Storage = Scalar>
struct PanelReading {
  static constexpr int rows = PackedWeight<Scalar, Storage>::panel_rows;
  static constexpr int filling =
      (std::min)(Lanes<Scalar>::packet_size, (std::max)(1, 32 / static_cast<int>(sizeof(Scalar))));
  using P = Lanes<Scalar, Lanes<Scalar>::count / (std::max)(rows, filling)>;
  static constexpr int cols = P::count / rows;
  /// How often a value of the position is needed: a single time, it is broadcast.
  static constexpr int copies = cols == 1 ? 1 : rows;
  /// Places at which panels are read at a time, far from each other: memory answers so many streams
  /// sooner than one.
  static constexpr int panels = 4;
  /// Columns whose values lie side by side.
  static constexpr int side = std::is_same_v<Scalar, Storage> ? 1 : side_by_side<Storage>;
  /// One sum would wait for its own additions.
  static constexpr int sums = (std::max)(side, 8 / P::packets / panels);
  /// Steps at a place before the next, 512 bytes: with fewer, the last cache answers later.
  static constexpr Index run =
      (std::max)(Index{1}, 512 / (P::count * static_cast<Index>(sizeof(Storage))) / sums) * sums;

  static LOCAL_MHA_INLINE P multiply_add(const Scalar* x, const P& weights, const P& sum) {
    if constexpr (cols == 1)
      return fma(*x, weights, sum);
    else
      return fma(P::load(x), weights, sum);
  }
};

}  // namespace detail

/// Values of a position for project_lane().
template <typename Scalar, typename Storage>
Index spread_size(const PackedWeight<Scalar, Storage>& weight) {
  using Reading = detail::PanelReading<Scalar, Storage>;
  return weight.panel_size() / Reading::rows * Reading::copies;
}

/// Prepares one position for project_lane(): its values one after the other, each as often as is
/// needed, then zeros.
/// \param x `[weight.depth()]`, values `x_stride` apart: `block_rows` for a lane of a block
/// \param spread `[spread_size(weight)]`
template <typename Scalar, typename Storage>
void spread_lane(const PackedWeight<Scalar, Storage>& weight, const Scalar* x, Index x_stride,
                 Scalar* spread) {
  constexpr Index copies = detail::PanelReading<Scalar, Storage>::copies;
  for (Index d = 0; d < weight.depth(); ++d)
    std::fill(spread + d * copies, spread + (d + 1) * copies, x[d * x_stride]);
  std::fill(spread + weight.depth() * copies, spread + spread_size(weight), Scalar(0));
}

namespace detail {

/// `Panels` panels of a weight, `apart` from each other, for project_lane().
/// \param panel the first, counted through all groups
/// \param first_group where y begins
template <int Panels, typename Scalar, typename Storage>
LOCAL_MHA_INLINE void project_lane_panels(const PackedWeight<Scalar, Storage>& weight, Index panel,
                                          Index apart, const Scalar* spread, Index first_group,
                                          Scalar* y, Index y_stride) {
  using Reading = PanelReading<Scalar, Storage>;
  using P = typename Reading::P;
  constexpr Index rows = Reading::rows;
  constexpr Index x_step = Reading::cols * Reading::copies;
  constexpr int sums = Reading::sums;
  const Index steps = weight.panel_size() / P::count;
  const Storage* from[Panels];
  P acc[Panels][sums];
  LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
    from[p] = weight.panel(0, panel + p * apart);
    LOCAL_MHA_UNROLL for (int s = 0; s < sums; ++s) acc[p][s] = P::zero();
  }
  const Scalar* x = spread;
  Index i = 0;
  for (const Index whole = steps / sums * sums; i < whole;) {
    const Index run = (std::min)(Reading::run, whole - i);
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
      for (Index j = 0; j < run; j += sums) {
        LOCAL_MHA_UNROLL for (int s = 0; s < sums; s += Reading::side) {
          P weights[Reading::side];
          load_side_by_side(from[p] + (i + j + s) * P::count, weights);
          LOCAL_MHA_UNROLL for (int k = 0; k < Reading::side; ++k) acc[p][s + k] =
              Reading::multiply_add(x + (j + s + k) * x_step, weights[k], acc[p][s + k]);
        }
      }
    }
    i += run;
    x += run * x_step;
  }
  for (; i < steps; i += Reading::side, x += Reading::side * x_step) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
      P weights[Reading::side];
      load_side_by_side(from[p] + i * P::count, weights);
      LOCAL_MHA_UNROLL for (int k = 0; k < Reading::side; ++k) acc[p][k] =
          Reading::multiply_add(x + k * x_step, weights[k], acc[p][k]);
    }
  }
  // Of all panels before any is read: what is indexed by a variable has no registers.
  alignas(64) Scalar all[Panels][P::count];
  LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
    LOCAL_MHA_UNROLL for (int s = 1; s < sums; ++s) acc[p][0] = acc[p][0] + acc[p][s];
    acc[p][0].store(all[p]);
  }
  for (auto& sum : all) {
    const Index group = panel / weight.group_panels();
    const Index row = panel % weight.group_panels() * rows;
    Scalar* const to = y + ((group - first_group) * weight.group_rows() + row) * y_stride;
    for (Index r = 0; r < (std::min)(rows, weight.group_rows() - row); ++r) {
      for (Index lane = r + rows; lane < P::count; lane += rows) sum[r] = sum[r] + sum[lane];
      to[r * y_stride] = sum[r];
    }
    panel += apart;
  }
}

/// Panels of a weight, counted through all groups, for project_lane().
template <typename Scalar, typename Storage>
void project_lane_panels(const PackedWeight<Scalar, Storage>& weight, const Range& panels,
                         const Scalar* spread, Index first_group, Scalar* y, Index y_stride) {
  constexpr int together = PanelReading<Scalar, Storage>::panels;
  const Index apart = (panels.end - panels.begin) / together;
  Index panel = panels.begin;
  for (; panel < panels.begin + apart; ++panel)
    project_lane_panels<together>(weight, panel, apart, spread, first_group, y, y_stride);
  for (panel += (together - 1) * apart; panel < panels.end; ++panel)
    project_lane_panels<1>(weight, panel, 1, spread, first_group, y, y_stride);
}

}  // namespace detail

/// project() of a single position. Its lanes are rows of the weight: panels are multiplied as they
/// lie, several at a time. The order in which a row is summed does not depend on how many there
/// are.
/// \param some_rows those of the group that are computed, whole panels
/// \param spread made by spread_lane()
/// \param y `[group_rows]`, values `y_stride` apart: `block_rows` for a lane of a block
template <typename Scalar, typename Storage>
void project_lane(const PackedWeight<Scalar, Storage>& weight, Index group, const Range& some_rows,
                  const Scalar* spread, Scalar* y, Index y_stride) {
  constexpr Index rows = PackedWeight<Scalar, Storage>::panel_rows;
  const Index first = group * weight.group_panels();
  detail::project_lane_panels(
      weight, {first + some_rows.begin / rows, first + ceil_div(some_rows.end, rows)}, spread,
      group, y, y_stride);
}

/// The same for all rows of the group.
template <typename Scalar, typename Storage>
void project_lane(const PackedWeight<Scalar, Storage>& weight, Index group, const Scalar* spread,
                  Scalar* y, Index y_stride) {
  project_lane(weight, group, {0, weight.group_rows()}, spread, y, y_stride);
}

/// The same for some groups.
/// \param y `[groups][group_rows]`
template <typename Scalar, typename Storage>
void project_lane(const PackedWeight<Scalar, Storage>& weight, const Range& groups,
                  const Scalar* spread, Scalar* y) {
  const Index panels = weight.group_panels();
  detail::project_lane_panels(weight, {groups.begin * panels, groups.end * panels}, spread,
                              groups.begin, y, 1);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
