// SPDX-License-Identifier: MIT
/// \file
/// The keys that a block of queries sees, as they lie in stores: what the window shows, and rows
/// that are pinned before and after it.
#pragma once

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/pinned.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Where keys and values lie.
/// \tparam Values a Ring, Rows, or ValueOperands
/// \tparam Keys a Ring, or KeyOperands; a Ring of another storage is for single queries, with
///         values in the same
template <typename Scalar, typename Values, typename Keys = Ring<Scalar>>
struct KeyStore {
  const Keys* keys = nullptr;
  const Values* values = nullptr;
};

namespace detail {

/// Keys one after the other in a store, and what the tile's queries see of them.
template <typename Scalar, typename Keys = Ring<Scalar>>
struct KeyStrip {
  const QueryTile<Scalar>* tile;
  const Keys* keys;
  const Index* blocks;  ///< of the store in the sequence; null: the same

  Index block_in_sequence(Index block) const { return blocks == nullptr ? block : blocks[block]; }
  const RotarySteps<Scalar>* steps(const AttentionHead<Scalar>& head) const {
    return blocks == nullptr ? head.steps : head.pinned_steps;
  }
};
template <typename Scalar, typename Values, typename Keys = Ring<Scalar>>
struct Strip : KeyStrip<Scalar, Keys> {
  const Values* values;
};

/// Those of a block of queries, none of which is empty but for the first.
template <typename Scalar, typename Values, typename Keys = Ring<Scalar>>
struct Strips {
  using Tile = QueryTile<Scalar>;

  Strips(const AttentionHead<Scalar>& of_head, const Tile& tile,
         const KeyStore<Scalar, Values, Keys>& window)
      : head(of_head), strips{{{&tile, window.keys, nullptr}, window.values}} {}

  void add(const Tile& tile, const KeyStore<Scalar, Values, Keys>& store,
           const PinnedRows<Scalar>& rows) {
    if (tile.keys.begin < tile.keys.end)
      strips[number++] = {{&tile, store.keys, rows.blocks().data()}, store.values};
  }
  const Strip<Scalar, Values, Keys>* begin() const { return strips; }
  const Strip<Scalar, Values, Keys>* end() const { return strips + number; }

  const AttentionHead<Scalar>& head;
  Strip<Scalar, Values, Keys> strips[3];
  int number = 1;
};

/// Keys of a strip whose scores lie one after the other.
template <typename Scalar, typename Keys = Ring<Scalar>>
struct KeyPiece {
  static constexpr Index count = block_rows<Scalar>;

  const KeyStrip<Scalar, Keys>* strip;
  Range keys;
  Scalar* scores;  ///< of the first key's block
  Pair* pairs;     ///< its probabilities, where they are operands, of blocks()

  const QueryTile<Scalar>& tile() const { return *strip->tile; }
  /// Those that hold the keys.
  Range blocks() const { return {keys.begin / count, ceil_div(keys.end, count)}; }
  Scalar* score(Index key) const { return scores + (key - blocks().begin * count) * count; }
  Pair* pairs_of_block(Index block) const {
    return pairs + (block - blocks().begin) * (count / 2 * count);
  }
};
template <typename Scalar, typename Values, typename Keys = Ring<Scalar>>
struct Piece : KeyPiece<Scalar, Keys> {
  const Values* values;
};

/// Those whose scores are kept at once.
template <typename Scalar, typename Values, typename Keys = Ring<Scalar>>
struct Chunk {
  const Piece<Scalar, Values, Keys>* begin() const { return pieces; }
  const Piece<Scalar, Values, Keys>* end() const { return pieces + number; }

  Piece<Scalar, Values, Keys> pieces[3];
  int number = 0;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
