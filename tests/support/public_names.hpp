// SPDX-License-Identifier: MIT
/// \file
/// The public functions of headers, by reading their text.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace support {

/// Reads what clang-format wrote: functions of namespace local_mha and of the public classes in it,
/// but for namespace detail, and for those that take nothing, copy, or are deleted or defaulted.
/// A member that is defined outside of its class counts where it is declared.
class PublicNames {
 public:
  /// Names such as `validate` and `Linear::forward`, a constructor's being `Linear::Linear`.
  static std::set<std::string> of_file(const std::filesystem::path& header) {
    std::ifstream in(header);
    if (!in) throw std::runtime_error("cannot read " + header.string());
    return of_text({std::istreambuf_iterator<char>(in), {}});
  }
  static std::set<std::string> of_text(const std::string& text) {
    PublicNames reader;
    reader.read(without_comments(text));
    return reader.names_;
  }

 private:
  enum class Kind { space, type, body };
  struct Scope {
    Kind kind;
    std::string name;
    bool is_public;  // what stands at this place of it
  };

  // Also without literals and preprocessor directives.
  static std::string without_comments(const std::string& text) {
    std::string code;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text.compare(i, 2, "//") == 0) {
        while (i < text.size() && text[i] != '\n') ++i;
        code += '\n';
      } else if (text.compare(i, 2, "/*") == 0) {
        i = text.find("*/", i) + 1;
      } else if (text[i] == '"' || (text[i] == '\'' && !std::isalnum(to_unsigned(text[i - 1])))) {
        const char quote = text[i];
        for (++i; text[i] != quote; ++i)
          if (text[i] == '\\') ++i;
        code += quote, code += quote;
      } else if (text[i] == '#' && (code.empty() || code.back() == '\n')) {
        for (; i < text.size() && text[i] != '\n'; ++i)
          if (text[i] == '\\') ++i;
        code += '\n';
      } else {
        code += text[i];
      }
    }
    return code;
  }

  void read(const std::string& code) {
    int parentheses = 0;
    for (std::size_t i = 0; i < code.size(); ++i) {
      const char c = code[i];
      const bool in_body = !scopes_.empty() && scopes_.back().kind == Kind::body;
      if (c == '(') ++parentheses;
      if (c == ')') --parentheses;
      if (c == '{' && (parentheses > 0 || begins_value(declaration_))) {
        for (int depth = 0; depth += code[i] == '{' ? 1 : code[i] == '}' ? -1 : 0, depth > 0;) ++i;
        continue;
      }
      if (parentheses == 0 && c == '{') {
        open(in_body);
        declaration_.clear();
      } else if (parentheses == 0 && c == '}') {
        if (scopes_.empty()) throw std::runtime_error("braces do not match");
        scopes_.pop_back();
        declaration_.clear();
      } else if (parentheses == 0 && c == ';') {
        if (!in_body) note_function();
        declaration_.clear();
      } else if (c == ':' && is_access(trimmed(declaration_))) {
        scopes_.back().is_public = trimmed(declaration_) == "public";
        declaration_.clear();
      } else {
        declaration_ += c;
      }
    }
  }

  // True if what follows is no body, but the value of a variable or a default.
  static bool begins_value(const std::string& declaration) {
    static const std::regex value("=\\s*[\\w:<>, ]*$");
    return std::regex_search(declaration, value);
  }

  static bool is_access(const std::string& word) {
    return word == "public" || word == "private" || word == "protected";
  }

  void open(bool in_body) {
    static const std::regex space("(?:inline )?namespace ?([\\w: ]*)");
    static const std::regex type("(?:class|struct) ([\\w:<>, ]*?)(?: final)?(?: : .*)?");
    const std::string text = without_template(trimmed(declaration_));
    std::smatch match;
    if (in_body) {
      scopes_.push_back({Kind::body, "", false});
    } else if (std::regex_match(text, match, space)) {
      const std::string name = match[1];
      scopes_.push_back({Kind::space, name, name.find("detail") == std::string::npos});
    } else if (std::regex_match(text, match, type)) {
      const std::string name = std::regex_replace(match[1].str(), std::regex("<[^>]*>"), "");
      scopes_.push_back({Kind::type, name, text.starts_with("struct")});
    } else {
      note_function();
      scopes_.push_back({Kind::body, "", false});
    }
  }

  void note_function() {
    std::string text = without_template(trimmed(declaration_));
    static const std::regex other("(using|typedef|friend|static_assert|template|return)\\b.*");
    if (std::regex_match(text, other)) return;
    if (scopes_.empty() || !scopes_.front().name.starts_with("local_mha")) return;
    std::string type;
    for (const Scope& scope : scopes_) {
      if (!scope.is_public) return;
      if (scope.kind == Kind::type) type += scope.name + "::";
    }
    text = std::regex_replace(text, std::regex("operator ?\\(\\)"), "operator@");
    const std::size_t begin = first_parenthesis(text);
    if (begin == std::string::npos || text.find('=') < begin) return;
    const std::size_t end = matching(text, begin);
    const std::string parameters = trimmed(text.substr(begin + 1, end - begin - 1));
    const std::string rest = trimmed(text.substr(end + 1));
    static const std::regex last_word(".*?(~?[\\w@]+)");
    std::smatch match;
    const std::string before = trimmed(text.substr(0, begin));
    if (!std::regex_match(before, match, last_word)) return;
    if (match[1].first - before.begin() >= 2 && *(match[1].first - 1) == ':') return;  // a member's
    std::string name = match[1];
    if (parameters.empty() || name.starts_with('~') || name.ends_with('_')) return;
    if (rest.starts_with("= delete") || rest.starts_with("= default")) return;
    if (rest.starts_with("->") && before.find("auto ") == std::string::npos) return;
    if (std::regex_match(parameters, std::regex("(const )?" + name + "(&|&&)( \\w+)?"))) return;
    std::replace(name.begin(), name.end(), '@', ' ');
    names_.insert(type + std::regex_replace(name, std::regex("operator "), "operator()"));
  }

  static unsigned char to_unsigned(char c) { return static_cast<unsigned char>(c); }

  static std::string trimmed(const std::string& text) {
    static const std::regex blanks("\\s+");
    std::string words = std::regex_replace(text, blanks, " ");
    if (words.starts_with(' ')) words.erase(0, 1);
    if (words.ends_with(' ')) words.pop_back();
    return words;
  }

  // Without macros, `template <…>` and a `requires` clause at the front.
  static std::string without_template(std::string text) {
    static const std::regex macros("(?:[A-Z][A-Z_]+ )+");
    text = std::regex_replace(
        text, macros, "",
        std::regex_constants::format_first_only | std::regex_constants::match_continuous);
    while (text.starts_with("template <")) {
      std::size_t end = text.find('<');
      for (int depth = 0; depth += text[end] == '<' ? 1 : text[end] == '>' ? -1 : 0, depth > 0;)
        ++end;
      text = trimmed(text.substr(end + 1));
    }
    if (text.starts_with("requires(") || text.starts_with("requires (")) {
      text = trimmed(text.substr(matching(text, text.find('(')) + 1));
    } else if (text.starts_with("requires ")) {
      std::size_t end = 9;
      for (int depth = 0; end < text.size() && (depth > 0 || text[end] != ' '); ++end)
        depth += text[end] == '<' ? 1 : text[end] == '>' ? -1 : 0;
      text = trimmed(text.substr(std::min(end, text.size())));
    }
    return text;
  }

  // The first that stands in no template argument.
  static std::size_t first_parenthesis(const std::string& text) {
    int depth = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      depth += text[i] == '<' ? 1 : text[i] == '>' ? -1 : 0;
      if (depth == 0 && text[i] == '(') return i;
    }
    return std::string::npos;
  }

  static std::size_t matching(const std::string& text, std::size_t begin) {
    int depth = 0;
    for (std::size_t i = begin; i < text.size(); ++i) {
      depth += text[i] == '(' ? 1 : text[i] == ')' ? -1 : 0;
      if (depth == 0) return i;
    }
    throw std::runtime_error("parentheses do not match: " + text);
  }

  std::string declaration_;
  std::vector<Scope> scopes_;
  std::set<std::string> names_;
};

}  // namespace support
