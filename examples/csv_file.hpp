// SPDX-License-Identifier: MIT
/// \file
/// Tables of numbers.
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <local_mha/core/types.hpp>

#include "input_file.hpp"

namespace local_mha::examples {

/// Columns of numbers and their names.
struct Table {
  std::vector<std::string> names;
  RowMatrix<float> rows;
};

/// Reads a file of numbers of at most 1e15 with commas between them. The first line that is not
/// empty names the columns, if it has something else than numbers.
/// \throws std::runtime_error naming the file, the line and what is wrong with it
inline Table read_csv(const std::string& path) {
  std::ifstream file = open_input(path);
  Table table;
  std::vector<float> numbers;
  std::string text;
  std::size_t line = 0;
  const auto fail = [&](const std::string& problem) {
    throw std::runtime_error(path + ": line " + std::to_string(line) + ": " + problem);
  };
  while (std::getline(file, text)) {
    ++line;
    constexpr std::string_view utf8_mark = "\xEF\xBB\xBF";
    if (line == 1 && text.starts_with(utf8_mark)) text.erase(0, utf8_mark.size());
    while (!text.empty() && (text.back() == '\r' || text.back() == ' ')) text.pop_back();
    if (text.empty()) continue;
    const bool first = table.names.empty();
    std::vector<std::string> fields(1);
    for (const char c : text)
      if (c == ',')
        fields.emplace_back();
      else if (c != '"' && (c != ' ' || !fields.back().empty()))
        fields.back() += c;
    std::vector<float> row;
    for (std::string& field : fields) {
      while (field.ends_with(' ')) field.pop_back();
      double number = 0;
      const char* const end = field.data() + field.size();
      const char* const begin = field.data() + (field.starts_with('+') ? 1 : 0);
      const auto read = std::from_chars(begin, end, number);
      if (read.ec == std::errc() && read.ptr == end && std::abs(number) <= 1e15) {
        row.push_back(static_cast<float>(number));
      } else if (!first) {
        fail("expected a number of at most 1e15, got '" + field + "'");
      }
    }
    if (first) {
      table.names = fields;
      for (std::size_t i = 0; row.size() == fields.size() && i < fields.size(); ++i)
        table.names[i] = "column " + std::to_string(i + 1);
      if (row.size() < fields.size()) continue;
    }
    if (row.size() != table.names.size())
      fail("expected " + std::to_string(table.names.size()) + " numbers, got " +
           std::to_string(row.size()));
    numbers.insert(numbers.end(), row.begin(), row.end());
  }
  if (file.bad()) throw std::runtime_error(path + ": cannot be read");
  const auto columns = static_cast<Index>(table.names.size());
  const Index rows = columns > 0 ? static_cast<Index>(numbers.size()) / columns : 0;
  table.rows = Eigen::Map<RowMatrix<float>>(numbers.data(), rows, columns);
  return table;
}

/// Gives each column the mean 0 and the deviation 1, as it has them in its first rows.
/// \param first how many rows those are, at least 1
inline void normalize(RowMatrix<float>& rows, Index first) {
  for (auto column : rows.colwise()) {
    column.array() -= column.head(first).mean();
    column /= std::sqrt(column.head(first).squaredNorm() / static_cast<float>(first)) + 1e-6F;
  }
}

}  // namespace local_mha::examples
