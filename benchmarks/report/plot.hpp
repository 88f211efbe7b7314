// SPDX-License-Identifier: MIT
/// \file
/// Line plots with a logarithmic x axis, side by side in a PNG.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace report {

struct Series {
  std::string label = {};
  std::vector<std::pair<double, double>> points = {};  ///< x > 0, ascending
};

struct Panel {
  std::string title = {};
  std::string x_label = {};
  std::string y_label = {};
  std::vector<Series> series = {};
  double y_max = 0;  ///< the y axis goes from 0 to here; 0: as far as the points go
};

/// \throws std::runtime_error if the file cannot be written
void write_plot(const std::string& path, const std::vector<Panel>& panels);

}  // namespace report
