# SPDX-License-Identifier: MIT
"""Which mutants there are of a header: the list of operators, and what is not mutated.

The sources are as clang-format leaves them: a binary operator stands between spaces, which brackets of
templates do not, and what an operator looks for stands in one line.
"""
import dataclasses
import hashlib
import re


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str          # below include/
    number: int        # of the line, from 1; for people, not for keys
    operator: str
    line: str          # its text, without the spaces around it
    becomes: str
    begin: int         # what is replaced, in the file's text
    end: int
    replacement: str
    again: int = 0     # of mutants that all this is the same of, so many come before

    @property
    def id(self):
        key = "\n".join([self.file, self.operator, self.line, self.becomes, str(self.again)])
        return hashlib.sha256(key.encode()).hexdigest()[:12]


# A name, a member, a call, an element: what stands between two binary operators.
TERM = r"(?:[\w.:]|->|(?<=\w)\((?:[^()]|\([^()]*\))*\)|(?<=[\w\])])\[[^\[\]]*\])+"
# Behind a term that can go without taking a factor with it.
END_OF_TERM = r"(?=[,;)\]}]| (?:[-+<>=?:&|]|[<>=!]=|&&|\|\|) )"
END_OF_FACTOR = r"(?=[,;)\]}]| (?:[-+*<>=?:&|]|[<>=!]=|&&|\|\|) )"


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    pattern: str       # in a line without comments and texts
    replacement: object  # text, or what makes it of a match and the line itself; None: no mutant


def table(pairs):
    return lambda match, line: pairs.get(match.group(1))


def next_number(match, line):
    return str(int(match.group(0).replace("'", "")) + 1)


def next_float(match, line):
    if float(match.group(1).replace("'", "")) == 0:
        return None
    return "(%s * 1.01%s)" % (match.group(0), match.group(2) or "")


# One mutant at a time, where its pattern is found.
OPERATORS = [
    # off by one
    Operator("border", r"(?<= )(<=|>=|<|>)(?= )", table({"<": "<=", "<=": "<", ">": ">=", ">=": ">"})),
    Operator("one less", r" \+ 1(?![\w.'])", ""),
    Operator("one more", r" - 1(?![\w.'])", ""),
    Operator("one too far", r"(?<= [-+] )1(?![\w.'])", "2"),
    Operator("from 1", r"(?<= = )0(?=;)", "1"),
    Operator("rounded down", r"\bceil_div\(((?:[^(),]|\([^()]*\))+), ((?:[^(),]|\([^()]*\))+)\)",
             lambda match, line: "((%s) / (%s))" % match.groups()),
    Operator("next number", r"(?<![\w.'])(?:[2-9]|[1-9][0-9']*[0-9])(?![\w.'>])", next_number),
    # dropped term
    Operator("dropped term", r" [-+] " + TERM + END_OF_TERM, ""),
    Operator("dropped factor", r" [*/%] " + TERM + END_OF_FACTOR, ""),
    Operator("dropped statement",
             r"(?<=^)(?!return|throw|delete|using|else|case|break|continue|reject|fail|require|static|"
             r"[\w:]*require_)"
             r"(?:\+\+|--)?[\w.:>\[\]()*-]+(?:<[\w, :]*>)?(?:\(.*\)| (?:[-+*/|&]|<<)?= .+);$", ";"),
    # other arithmetic
    Operator("other sign", r"(?<= )([-+])(?= )", table({"+": "-", "-": "+"})),
    Operator("other factor", r"(?<= )([*/%])(?= )", table({"*": "+", "/": "*", "%": "/"})),
    Operator("other sum", r"(?<= )([-+*])=(?= )",
             lambda match, line: {"+": "-=", "-": "+=", "*": "="}[match.group(1)]),
    Operator("no sign", r"(?<=[(=,?:] )-(?=[\w(])|(?<=\()-(?=[\w(])|(?<=return )-(?=[\w(])", ""),
    Operator("other number", r"(?<![\w.'])(\d+\.\d+(?:[eE][-+]?\d+)?)(F?)(?![\w.'])", next_float),
    # swapped comparison
    Operator("swapped comparison", r"(?<= )(<=|>=|<|>|==|!=)(?= )",
             table({"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="})),
    Operator("min and max", r"(?<=std::)(min|max)(?=\)\(|\)?<)", table({"min": "max", "max": "min"})),
    # wrong lane
    Operator("lane 0", r"(?<=\w\[)(?!0\]|\d+\])[\w ]+(?=\])", "0"),
    Operator("other end", r"(?<=\.)(begin|end)\b(?!\()", table({"begin": "end", "end": "begin"})),
    Operator("keys and values", r"(?<!\w)(?<!tile\.)(?<!tile->)(keys|values|k|v|grad_keys|grad_values|dim_head|dim_value)(?=[.,);\[])",
             table({"keys": "values", "values": "keys", "k": "v", "v": "k", "grad_keys": "grad_values",
                    "grad_values": "grad_keys", "dim_head": "dim_value", "dim_value": "dim_head"})),
    # missing check
    Operator("missing check",
             r"^if (?!constexpr)\(.*\) (?:return|continue|break|throw|fail|reject|unexpected)\b.*;$|"
             r"^(?:[\w:]*require\w*|check\w*)\(.*\);$", ";"),
    Operator("never", r"^(?:\} else )?if \((?!const |auto |.*;)(.*)\)(?= \{$|$)",
             lambda match, line: line[match.start():match.start(1)] + "false && (" +
             line[match.start(1):match.end(1)] + "))"),
    Operator("missing condition", r" (?:&&|\|\|) !?" + TERM + r"(?: (?:[<>=!]=|[<>]) " + TERM + r")?(?=[;)]| \?| (?:&&|\|\|) )",
             ""),
    Operator("and and or", r"(?<= )(&&|\|\|)(?= )", table({"&&": "||", "||": "&&"})),
    Operator("not", r"(?<=[( ])!(?=[\w(])", ""),
    Operator("true and false", r"\b(true|false)\b", table({"true": "false", "false": "true"})),
]

# What no test can see, for it decides how fast something is, or how much room it has beyond what it needs;
# and what is said in errors. A line that holds one of these is not mutated.
NOT_MUTATED = [
    (r"\bupcoming|\bprefetch|\bfetch|\bahead\)|Ahead\{|micro_kernel|panel_products", "what is fetched ahead"),
    (r"^keys / count \* ceil_div\(dim_value", "what is fetched ahead"),
    (r"\breserve\(|\bcapacity\(|madvise|huge_page|is_much", "memory asked for at once"),
    (r"LOCAL_MHA_(?:NO)?INLINE\b.*;$|\bNOLINT", "hints for compilers"),
    (r"to_string\(|\bprintable\(|\bdescribe\(|\bquoted\(|\bmessage\b|\bproblem\b", "texts of errors"),
    (r"^static_assert|^using |^friend |^template|^typename|^requires|^concept|^namespace|^class |^struct |^enum ",
     "declarations"),
    (r"static constexpr (?:int|Index) (?:most_pieces|together|panels|panel_keys|most|least|chunk_keys|segment_keys|"
     r"part_blocks|group|rows|values|half_keys|accumulators|registers)\b", "sizes of tiles"),
    (r"constexpr (?:int|Index) (?:together|most|least|panels|most_pieces)\b", "sizes of tiles"),
    (r"\bis_next<|\? most : (?:group|least)|\bmany\b", "sizes of tiles"),
]
_not_mutated = re.compile("|".join(pattern for pattern, _ in NOT_MUTATED))


def code_of(text):
    """The text with comments, texts and what the preprocessor reads blanked out, of the same length."""
    out = list(text)

    def blank(begin, end):
        for at in range(begin, end):
            if out[at] != "\n":
                out[at] = " "

    at = 0
    while at < len(text):
        if text.startswith("//", at):
            end = text.find("\n", at)
            blank(at, end if end >= 0 else len(text))
            at = end if end >= 0 else len(text)
        elif text.startswith("/*", at):
            end = text.find("*/", at) + 2
            blank(at, end)
            at = end
        elif text[at] == '"' or (text[at] == "'" and not (at > 0 and text[at - 1].isalnum())):
            end = at + 1
            while text[end] != text[at]:
                end += 2 if text[end] == "\\" else 1
            blank(at + 1, end)
            at = end + 1
        elif text[at] == "#" and not text[text.rfind("\n", 0, at) + 1:at].strip():
            end = text.find("\n", at)
            while text[end - 1] == "\\":
                end = text.find("\n", end + 1)
            blank(at, end)
            at = end
        else:
            at += 1
    code = "".join(out)
    for pattern in (r"\bstatic_assert\([^;]*\);", r"\btemplate <[^\n{;]*>(?=\n| )", r"\boperator *[^\s(\w]+",
                    r"_Pragma\([^)]*\)"):
        code = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match.group(0)), code)
    return code


def mutants_of(file, text, is_compiled=lambda number: True):
    """All mutants of a header.

    is_compiled: whether a line is compiled for this processor by this compiler
    """
    code = code_of(text)
    starts = [0] + [at + 1 for at, c in enumerate(text) if c == "\n"]
    lines = code.split("\n")
    found, seen = [], {}
    for index, line in enumerate(lines):
        stripped = line.strip()
        if not stripped or not is_compiled(index + 1) or _not_mutated.search(stripped):
            continue
        # A statement is one whose line before ends one, or a condition of it.
        before = next((l.strip() for l in reversed(lines[:index]) if l.strip()), "")
        indent = len(line) - len(line.lstrip())
        for operator in OPERATORS:
            whole = operator.pattern.startswith("^") or "(?<=^)" in operator.pattern
            if whole and not re.search(r"[;{}]$|^else$|\)$|:$", before):
                continue
            if operator.name in ("dropped statement", "from 1", "keys and values") and not is_in_function(lines, index):
                continue
            # Their conditions are one thing, their texts another.
            if re.match(r"(?:reject|fail|refuse)\(", stripped):
                continue
            for match in re.finditer(operator.pattern, stripped):
                new = operator.replacement
                new = new(match, text[starts[index] + indent:]) if callable(new) else new
                if new is None or not is_sensible(operator, match, new, lines, index):
                    continue
                begin = starts[index] + indent + match.start()
                end = starts[index] + indent + match.end()
                original = text[starts[index]:starts[index] + len(line)]
                becomes = (original[:indent + match.start()] + new + original[indent + match.end():]).strip()
                key = (operator.name, original.strip(), becomes)
                again = seen[key] = seen.get(key, -1) + 1
                found.append(Mutant(file, index + 1, operator.name, original.strip(), becomes, begin, end, new,
                                    again))
    return found


def is_sensible(operator, match, new, lines, index):
    """Whether a mutant has a chance to compile."""
    if operator.name == "lane 0":  # no array is declared here
        return not re.match(r"(?:alignas\(\d+\) )?(?:static |const |constexpr )*[\w:<>, *]+ \*?\w+\[", match.string)
    if operator.name == "keys and values":  # there is the other
        near = " ".join(lines[max(0, index - 15):index + 15])
        return re.search(r"(?<![\w])" + new + r"\b", near) and not re.search(r"int k = ", near)
    return True


def is_in_function(lines, index):
    """Whether the block that a line is in is one of statements."""
    indent = len(lines[index]) - len(lines[index].lstrip())
    for line in reversed(lines[:index]):
        text = line.strip()
        if text and len(line) - len(line.lstrip()) < indent:
            return not re.match(r"(?:class|struct|enum|namespace|union)\b|public:|private:|protected:", text)
    return False


def chosen(mutants, number, weight_of, seed):
    """So many mutants, the same ones for a seed whatever becomes of other lines: by the hash of what they are,
    spread over files by their weights and the root of how many mutants there are, and over operators."""
    files = {}
    for mutant in mutants:
        files.setdefault(mutant.file, []).append(mutant)
    weights = {file: weight_of(file) * len(of) ** 0.5 for file, of in files.items()}
    total = sum(weights.values())
    picked, left = [], []
    for file in sorted(files):
        by_operator = {}
        for mutant in sorted(files[file], key=lambda m: hashlib.sha256((seed + m.id).encode()).digest()):
            by_operator.setdefault(mutant.operator, []).append(mutant)
        order = sorted(by_operator, key=lambda name: hashlib.sha256((seed + file + name).encode()).digest())
        # Round by round, one of each operator, but no two of a line in the first rounds.
        ordered, rounds = [], 0
        while any(by_operator.values()):
            lines_of_round = set()
            for name in order:
                if by_operator[name]:
                    mutant = by_operator[name].pop(0)
                    if mutant.number in lines_of_round and len(by_operator[name]) > 0:
                        by_operator[name].append(mutant)
                        mutant = by_operator[name].pop(0)
                    lines_of_round.add(mutant.number)
                    ordered.append(mutant)
            rounds += 1
        share = max(1, int(number * weights[file] / total))
        picked += ordered[:share]
        left += [(place, mutant) for place, mutant in enumerate(ordered[share:])]
    left.sort(key=lambda pair: (pair[0], hashlib.sha256((seed + pair[1].id).encode()).digest()))
    picked += [mutant for _, mutant in left[:max(0, number - len(picked))]]
    return picked[:number] if len(picked) > number else picked
