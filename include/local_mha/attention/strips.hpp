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
#include <local_mha/core/types.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Where keys and values lie.
/// \tparam Values a Ring, or Rows
/// \tparam Keys a Ring; that of another storage is for single queries, with values in the same
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
template <typename Scalar>
struct KeyPiece {
  const KeyStrip<Scalar>* strip;
  Range keys;
  Scalar* scores;  ///< of the first key's block

  const QueryTile<Scalar>& tile() const { return *strip->tile; }
  Scalar* score(Index key) const {
    constexpr Index count = block_rows<Scalar>;
    return scores + (key - keys.begin / count * count) * count;
  }
};
template <typename Scalar, typename Values>
struct Piece : KeyPiece<Scalar> {
  const Values* values;
};

/// Those whose scores are kept at once.
template <typename Scalar, typename Values>
struct Chunk {
  const Piece<Scalar, Values>* begin() const { return pieces; }
  const Piece<Scalar, Values>* end() const { return pieces + number; }

  Piece<Scalar, Values> pieces[3];
  int number = 0;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
