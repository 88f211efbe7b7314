// SPDX-License-Identifier: MIT
/// \file
/// LocalTransformer over the ranks that hold a sequence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/mpi/stack.hpp>
#include <local_mha/mpi/sum.hpp>
#include <local_mha/ops/cross_entropy.hpp>
#include <local_mha/ops/embedding.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/token_batch.hpp>
#include <local_mha/transformer.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// local_mha::LocalTransformer of sequences that no rank holds alone: what mpi::LocalMHA says, of
/// all layers. The loss is that of the whole, the same on every rank.
///
///     local_mha::mpi::LocalTransformer<float> split_model(communicator, model);
///     // The tokens of this rank.
///     float loss = split_model.backward(gradients, input, labels, split);
///
/// \tparam Scalar float, double, or another type of numbers that may be copied as bytes
/// \tparam Storage, Arithmetic those of the model: see mpi::LocalMHA
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LocalTransformer {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  using Whole = local_mha::LocalTransformer<Scalar, Storage, Arithmetic>;
  using Access = local_mha::detail::StackAccess<Scalar, Storage, Arithmetic>;

 public:
  /// Its weights.
  using Parameters = LocalTransformerParameters<Scalar>;
  /// `[B, rows of this rank]`
  using Tokens = TensorView<const std::int64_t, 2>;

  /// Collective.
  /// \param communicator must outlive this
  /// \param model the same on every rank; its weights are shared
  /// \throws std::invalid_argument, on every rank, if they are not the same
  LocalTransformer(const Communicator& communicator, const Whole& model)
      : communicator_(&communicator),
        model_(model),
        weights_(communicator.alone([&] { return checksum_of(model); })),
        layers_(communicator.alone([&] {
          return detail::SplitStack<Scalar, Storage, Arithmetic>(communicator, weights().stack,
                                                                 weights_);
        })) {
    detail::Checksum config;
    detail::agree(communicator, "LocalTransformer", [&](detail::Agreement& agreement) {
      layers_.add_description(weights().stack, model.config().ff_dropout, config);
      config.add(model.config().ignore_index);
      agreement.same("config", config);
      agreement.same("weights", weights_);
    });
    weights_.add(config.value());
  }

  /// The model whose positions are split.
  const Whole& model() const { return model_; }
  /// The ranks.
  const Communicator& communicator() const { return *communicator_; }

  /// The logits of the next token at the positions of this rank.
  /// \param tokens `[B, split.rows()]`, those of this rank; of no sequence more than max_seq_len on
  ///        all ranks. Those behind a sequence's `call.lengths` may be anything
  /// \param call of the mask the rows of this rank; `cu_seqlens` and `lengths` of the whole
  /// \return their logits, `[B, split.rows(), num_tokens]`
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 3> forward(Tokens tokens, const Split& split, const EncoderCall& call = {}) const {
    agree("forward", tokens, nullptr, nullptr, split, call);
    return communicator_->alone([&] {
      const Batch batch(tokens, split, call, config().dim);
      Tensor<Scalar, 3> x;
      return batch.rows.unpacked(logits_of(batch, split, call, x, nullptr));
    });
  }

  /// Mean cross entropy, in nats, of labels that are given, over all ranks.
  /// \param input, labels `[B, split.rows()]`, those of this rank; labels equal to ignore_index do
  ///        not count
  /// \return the same on every rank; NaN if no label counts on any
  Scalar loss(Tokens input, Tokens labels, const Split& split, const EncoderCall& call = {}) const {
    agree("loss", input, &labels, nullptr, split, call);
    return communicator_->alone([&] {
      const Batch batch(input, split, call, config().dim);
      const Tensor<std::int64_t, 2> counted = batch.rows.packed(labels);
      Tensor<Scalar, 3> x;
      const Tensor<Scalar, 3> logits = logits_of(batch, split, call, x, nullptr);
      return mean_loss(logits, counted, count(logits, counted));
    });
  }

  /// loss() and its gradients.
  /// \param gradients the sums over all ranks are added here, on every rank, in the order of the
  ///        ranks: `Parameters::zeros(config)` at first
  /// \return the loss; NaN and no gradients if no label counts
  Scalar backward(Parameters& gradients, Tokens input, Tokens labels, const Split& split,
                  const EncoderCall& call = {}) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree("backward", input, &labels, &gradients, split, call);
    return communicator_->alone([&] { return run_back(gradients, input, labels, split, call); });
  }

 private:
  const auto& weights() const { return Access::weights(model_); }
  const LocalTransformerConfig& config() const { return model_.config(); }

  static detail::Checksum checksum_of(const Whole& model) {
    detail::Checksum sum;
    detail::add_parameters(Access::weights(model).unpacked(), sum);
    return sum;
  }

  // \param labels, gradients null: none are given
  void agree(std::string_view name, const Tokens& input, const Tokens* labels,
             const Parameters* gradients, const Split& split, const EncoderCall& call) const {
    detail::agree(*communicator_, name, [&](detail::Agreement& agreement) {
      agreement.check([&] {
        detail::check_split(*communicator_, split, call.device);
        require_shape("tokens", input.dimensions(), {-1, split.rows()});
        detail::check_stack_call(split, input.dimension(0), call);
        check_length(split.total(), call);
        const std::vector<Index> lengths = detail::own_lengths(split, call.lengths);
        Access::check_tokens(model_, "tokens", input, lengths);
        if (labels != nullptr) {
          require_shape("labels", labels->dimensions(), input.dimensions());
          Access::check_tokens(model_, "labels", *labels, lengths, config().ignore_index);
        }
        if (gradients != nullptr) local_mha::detail::require_fitting(*gradients, config());
      });
      agreement.same("weights", weights_);
      detail::agree_on_call(agreement, split, input.dimension(0), call);
    });
  }
  void check_length(Index total, const EncoderCall& call) const {
    const std::span<const Index> cu_seqlens = call.cu_seqlens;
    Index longest = cu_seqlens.empty() && call.lengths.empty() ? total : 0;
    for (const Index length : call.lengths) longest = (std::max)(longest, length);
    for (std::size_t s = 1; s < cu_seqlens.size(); ++s)
      longest = (std::max)(longest, cu_seqlens[s] - cu_seqlens[s - 1]);
    if (longest > config().max_seq_len)
      reject("tokens",
             "at most max_seq_len = " + std::to_string(config().max_seq_len) + " in a sequence",
             longest);
  }

  // The tokens of this rank that pass, and where in its sequence each is.
  struct Batch {
    Batch(const Tokens& tokens, const Split& split, const EncoderCall& call, Index dim)
        : own(split, {tokens.dimension(0), tokens.dimension(1), dim}, call),
          of_rank{.lengths = own.lengths()},
          rows(tokens, of_rank) {
      rows.for_each_sequence([&](Index, Index begin, Index end) {
        std::size_t next = 1;  // segment's end
        for (Index i = begin; i < end; ++i) {
          const Index row = split.stretch().begin + i - begin;
          while (next < call.cu_seqlens.size() && call.cu_seqlens[next] <= row) ++next;
          places.push_back(call.cu_seqlens.empty() ? row : row - call.cu_seqlens[next - 1]);
        }
      });
    }

    const Tensor<std::int64_t, 2>& tokens() const { return rows.tokens(); }

    detail::OwnRows own;
    EncoderCall of_rank;
    local_mha::detail::TokenBatch rows;
    std::vector<std::int64_t> places;
  };

  static Eigen::Map<RowMatrix<Scalar>> rows(Tensor<Scalar, 3>& x) {
    return {x.data(), x.dimension(0) * x.dimension(1), x.dimension(2)};
  }

  // \param x becomes what the layers give
  // \param saved null, or what becomes what their backward pass needs
  Tensor<Scalar, 3> logits_of(const Batch& batch, const Split& split, const EncoderCall& call,
                              Tensor<Scalar, 3>& x, detail::SavedSplitStack<Scalar>* saved) const {
    const Tensor<std::int64_t, 2>& tokens = batch.tokens();
    Tensor<Scalar, 3> embedded(tokens.dimension(0), tokens.dimension(1), config().dim);
    for (Index i = 0; i < tokens.size(); ++i)
      Access::embed(model_, tokens.data()[i], batch.places[static_cast<std::size_t>(i)],
                    embedded.data() + i * config().dim);
    x = Tensor<Scalar, 3>(embedded.dimensions());
    layers_.forward(weights().stack, split, batch.own, x, embedded, call, saved);
    return Access::project(model_, call.device, weights().to_logits_norm.forward(rows(x)), x);
  }

  // Labels that count, on all ranks.
  Index count(const Tensor<Scalar, 3>& logits, const Tokens& labels) const {
    auto counted = static_cast<std::int64_t>(local_mha::detail::count_labels(
        TensorView<const Scalar, 3>(logits).dimensions(), labels, config().ignore_index));
    const detail::Waiting waiting(*communicator_);
    detail::check(
        MPI_Allreduce(MPI_IN_PLACE, &counted, 1, MPI_INT64_T, MPI_SUM, communicator_->get()),
        "MPI_Allreduce");
    return static_cast<Index>(counted);
  }
  Scalar mean_loss(const Tensor<Scalar, 3>& logits, const Tokens& labels, Index counted) const {
    using Sum = LongSum<Scalar>;
    std::vector<Sum> sum{
        local_mha::detail::cross_entropy_sum<Scalar>(logits, labels, config().ignore_index)};
    detail::sum_over_ranks(*communicator_, sum);
    return Scalar(sum.front() / Sum(static_cast<double>(counted)));
  }

  Scalar run_back(Parameters& gradients, const Tokens& input, const Tokens& labels,
                  const Split& split, const EncoderCall& call) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    detail::SavedSplitStack<Scalar> saved;
    Tensor<Scalar, 3> x;
    const Batch batch(input, split, call, config().dim);
    const Tensor<std::int64_t, 2> own_labels = batch.rows.packed(labels);
    const Tensor<Scalar, 3> logits = logits_of(batch, split, call, x, &saved);
    const Index counted = count(logits, own_labels);
    const Scalar loss = mean_loss(logits, own_labels, counted);
    if (counted == 0) return loss;

    Parameters own = Parameters::zeros(config());
    Tensor<Scalar, 3> grad_logits = local_mha::detail::cross_entropy_gradient_of<Scalar>(
        logits, own_labels, config().ignore_index, counted);
    Tensor<Scalar, 3> grad(x.dimensions());
    const RowMatrix<Scalar> normed = weights().to_logits_norm.forward(rows(x));
    rows(grad) = weights().to_logits_norm.backward(
        linear_backward<AnyDevice, Scalar>(call.device, weights().to_logits.weight(), normed,
                                           rows(grad_logits), own.to_logits, nullptr),
        rows(x), own.to_logits_norm_weight, own.to_logits_norm_bias);
    layers_.backward(weights().stack, split, call.device, own, saved, grad);
    const Tensor<std::int64_t, 2>& tokens = batch.tokens();
    embedding_backward<Scalar>(
        own.token_emb, {tokens.data(), static_cast<std::size_t>(tokens.size())}, rows(grad));
    embedding_backward<Scalar>(own.pos_emb, batch.places, rows(grad));
    detail::add_sums<Scalar>(*communicator_, own, gradients);
    return loss;
  }

  const Communicator* communicator_;
  Whole model_;
  detail::Checksum weights_;  // and of the configuration
  detail::SplitStack<Scalar, Storage, Arithmetic> layers_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
