// SPDX-License-Identifier: MIT
/// \file
/// Anomalies of sensors: an encoder learns to foretell all of them an hour ahead, and where they
/// are much further from that than they were when all was well, something is wrong.
#include <iomanip>

#include <CLI/CLI.hpp>

#include <local_mha/local_mha.hpp>

#include "csv_file.hpp"
#include "heating_plant.hpp"
#include "program.hpp"
#include "series_plot.hpp"
#include "terminal.hpp"

namespace {

using namespace local_mha;
constexpr Index ahead = 4, dim = 32, batch = 8;

struct Weights {
  LinearParameters<float> in, out;
  EncoderParameters<float> encoder;
  static void visit_each(auto& set, auto&& visit) {
    visit("in", set.in);
    visit("encoder", set.encoder);
    visit("out", set.out);
  }
};

/// What a row has changed to `ahead` rows later, from those before it.
struct Predictor {
  Linear<float> in, out;
  Encoder<float> encoder;

  Predictor(Index sensors, const LocalMHAConfig& layer)
      : in({.in_features = sensors, .out_features = dim}, 1),
        out({.in_features = dim, .out_features = sensors}, 2),
        encoder({.depth = 2, .layers = {layer}}, 3) {}

  /// How far rows are from what was foretold; 0 in the first ones.
  RowMatrix<float> errors(const RowMatrix<float>& rows) const {
    const Index n = rows.rows() - ahead;
    auto change = out.forward(encoder.forward(in.forward({rows.data(), {1, n, rows.cols()}})));
    RowMatrix<float> errors = RowMatrix<float>::Zero(rows.rows(), rows.cols());
    errors.bottomRows(n) = rows.bottomRows(n) - rows.topRows(n) -
                           Eigen::Map<const RowMatrix<float>>(change.data(), n, rows.cols());
    return errors;
  }

  /// Trains on stretches of rows, by the mean of the errors' squares.
  void train(const RowMatrix<float>& rows, Index steps) {
    const Index sensors = rows.cols(), seqlen = std::min<Index>(384, rows.rows() - ahead);
    Weights weights{in.parameters(), out.parameters(), encoder.parameters()}, gradients = weights;
    AdamW optimizer({.weight_decay = 0.01}, weights);
    const CosineSchedule rate(3e-3, 1e-4, steps / 10, steps);
    Tensor<float, 3> x(batch, seqlen, sensors), change(batch, seqlen, sensors);
    RandomSequence random(4);
    for (Index step = 0; step < steps; ++step) {
      for (Index b = 0; b < batch; ++b) {
        const auto first = Index(random.uniform() * double(rows.rows() - ahead - seqlen + 1));
        Eigen::Map<RowMatrix<float>>(&x(b, 0, 0), seqlen, sensors) = rows.middleRows(first, seqlen);
        Eigen::Map<RowMatrix<float>>(&change(b, 0, 0), seqlen, sensors) =
            rows.middleRows(first + ahead, seqlen) - rows.middleRows(first, seqlen);
      }
      Linear<float>::Saved of_in, of_out;
      Encoder<float>::Saved of_encoder;
      const auto h = in.forward_saving(of_in, x), y = encoder.forward_saving(of_encoder, h);
      Tensor<float, 3> grad =
          (out.forward_saving(of_out, y) - change) * (2 / static_cast<float>(change.size()));
      set_zero(gradients);
      grad = out.backward(gradients.out, of_out, grad, y);
      grad = encoder.backward(gradients.encoder, of_encoder, grad);
      in.backward(gradients.in, of_in, grad, x);
      clip_gradients(gradients, 1.0);
      optimizer.step(weights, gradients, rate(step));
      in.set_parameters(weights.in);
      encoder.set_parameters(weights.encoder);
      out.set_parameters(weights.out);
    }
  }
};

/// Where rows from `known` on are further from 0 than any before it. What comes within four hours
/// is one alarm.
std::vector<examples::Stretch> alarms(const RowMatrix<float>& rows, Index known) {
  const float most = rows.topRows(known).cwiseAbs().maxCoeff();
  std::vector<examples::Stretch> found;
  for (Index i = known; i < rows.rows(); ++i) {
    if (rows.row(i).cwiseAbs().maxCoeff() <= most) continue;
    if (found.empty() || i >= found.back().second + 16) found.emplace_back(i, i);
    found.back().second = i + 1;
  }
  return found;
}

int run(int argc, char** argv) {
  CLI::App app("Learns half of a table; says what is odd in its last 2/5.", "anomaly_detection");
  std::string plot, csv;
  Index window = 96;
  bool quick = false;
  app.add_option("plot", plot, "A picture with the alarms marked, as PNG")->required();
  app.add_option("csv", csv, "Rows of numbers; without a file, sensors of a house, made here");
  app.add_option("--window", window, "Rows back that a layer sees")->capture_default_str();
  app.add_flag("--quick", quick, "Learns for some seconds only");
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  auto data = csv.empty() ? examples::make_heating_plant(365 * 96, 219 * 96, 1)
                          : examples::FaultyTable{examples::read_csv(csv), {}};
  const Index n = data.table.rows.rows(), known = n * 6 / 10;
  if (n < 200) reject("csv", "at least 200 rows", n);
  if (window < 1 || window > n / 4) reject("--window", "1 to a quarter of the rows", window);
  examples::require_different_files("plot", {{"the table", csv}, {"the picture", plot}});
  io::AtomicFile probe(plot);  // before the work, not after it
  const examples::Stopwatch watch;
  RowMatrix<float> rows = data.table.rows;
  examples::normalize(rows, n / 2);
  LocalMHAConfig layer{.dim = dim, .window_size = window, .dim_head = 16, .heads = 2};
  layer.causal = layer.prenorm = true;
  Predictor predictor(rows.cols(), layer);
  predictor.train(rows.topRows(n / 2), quick ? 120 : 400);
  RowMatrix<float> errors = predictor.errors(rows);
  examples::normalize(errors, known);
  std::cout << std::fixed << std::setprecision(2) << "learned for " << watch.seconds() << " s\n";
  const auto found = alarms(errors, known);
  for (const auto& [begin, end] : found) {
    std::size_t sensor = 0;
    errors.middleRows(begin, end - begin).cwiseAbs().colwise().maxCoeff().maxCoeff(&sensor);
    std::cout << "rows " << begin << " to " << end << ": " << data.table.names[sensor] << '\n';
  }
  if (csv.empty()) {
    examples::print_found("what was foretold", found, data.faults);
    RowMatrix<float> changes = RowMatrix<float>::Zero(n, rows.cols());
    changes.bottomRows(n - ahead) = rows.bottomRows(n - ahead) - rows.topRows(n - ahead);
    examples::print_found("changes within an hour", alarms(changes, known), data.faults);
    examples::print_found("values", alarms(rows, known), data.faults);
  }
  examples::draw_series_plot(
      "Alarms", data.table.names, data.table.rows, known,
      {{"alarms", {235, 120, 100}, found}, {"faults", {130, 195, 130}, data.faults}})
      .write_png(plot);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("anomaly_detection", [&] { return run(argc, argv); });
}
