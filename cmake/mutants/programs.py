# SPDX-License-Identifier: MIT
"""Which headers have mutants, and what is compiled and run for them.

What takes long to compile is compiled once, from the headers as they are: the reference, the tests, and the
instances of the library's templates (extern.hpp), in groups. Of a mutant, one group is compiled in float and
linked before the others, and of a function that two objects have the linker takes the first: so all tests run
on the mutant, at the price of one group. Those that survive it are met by more: both scalars, and programs that
are compiled from the mutated headers as a whole.
"""
import dataclasses
import fnmatch
import re


@dataclasses.dataclass(frozen=True)
class Part:
    headers: tuple    # patterns below include/local_mha; the first part that has a header takes it
    weight: float     # of a header, among others with as many mutants
    group: str        # of instances; "": none
    fast: tuple       # runs: (program, arguments...)
    slow: tuple
    units: tuple = ()  # test files that are compiled from the mutated headers
    sanitized: tuple = ()  # runs under sanitizers, beside those of `fast` that are of the soak
    sanitized_units: tuple = ()  # as `units`, under sanitizers


# Classes of extern.hpp by the group that they are compiled in; the others are in the last.
GROUPS = {
    "attention": r"AttentionForwardFlow|AttentionForward\b|class LocalAttention<",
    "layer": r"LayerSteps|LayerWorker|LayerWeights|class PackedWeight<|LayerForward|LayerBackward|class LocalMHA<|"
             r"SequenceStream<Scalar>",
    "modules": r"HyperConnection|FeedForward\b|FeedForwardWeights|LayerNorm|RmsNorm|class Linear<|"
               r"DynamicPositionBias|linear_backward_through",
    "stack": r"Stack|Encoder<|class LocalTransformer<|StreamedStack",
    "training": r"",
}

# Test files that are compiled once and linked together, and how.
UNITS = {
    "unit/attention_test.cpp": "-O0",
    "unit/attention_gradient_test.cpp": "-O0",
    "unit/unseen_keys_test.cpp": "-O0",
    "unit/bias_per_sequence_test.cpp": "-O0",
    "unit/sliding_test.cpp": "-O1",
    "unit/dropout_test.cpp": "-O0",
    "unit/streaming_test.cpp": "-O0",
    "unit/layer_test.cpp": "-O0",
    "unit/layer_gradient_test.cpp": "-O0",
    "unit/layer_options_test.cpp": "-O1",
    "unit/components_test.cpp": "-O0",
    "unit/residual_streams_test.cpp": "-O0",
    "unit/precision_test.cpp": "-O0",
    "unit/golden_test.cpp": "-O0",
    "unit/golden_gradient_test.cpp": "-O0",
    "unit/plan_test.cpp": "-O0",
    "unit/bad_input_test.cpp": "-O0",
    "unit/saved_call_test.cpp": "-O0",
    "unit/ragged_test.cpp": "-O0",
    "unit/repeated_calls_test.cpp": "-O0",
    "support/allocations.cpp": "-O0",
}

# Of products in bfloat16, whose instances are in none of the groups.
BF16 = ("unit/bf16_operands_test.cpp", "unit/bf16_unseen_test.cpp", "unit/bf16_arithmetic_test.cpp",
        "unit/bf16_backward_test.cpp")

# What test files need beside these, when they are compiled alone.
UNIT_NEEDS = {"unit/sixteen_bits_test.cpp": ["../benchmarks/measuring/heap.cpp"],
              **{unit: ["reference/operand_instances.cpp"] for unit in BF16},
              "io/files_out_of_memory_test.cpp": ["support/failing_memory.cpp"],
              "unit/encoder_streaming_test.cpp": ["support/allocations.cpp"],
              "unit/gradient_threads_test.cpp": ["support/allocations.cpp"],
              "unit/modules_test.cpp": ["support/allocations.cpp"],
              "unit/repeated_calls_test.cpp": ["support/allocations.cpp"],
              "unit/streaming_resources_test.cpp": ["support/allocations.cpp"]}

# Compiled from the mutated headers as a whole, at each mutant.
WHOLE = {
    "format": ("io/malformed_test.cpp", "io/float16_test.cpp", "io/safetensors_test.cpp", "io/sharded_test.cpp",
               "io/state_dict_test.cpp"),
    "models": ("io/kwargs_test.cpp", "io/load_attention_test.cpp", "io/weights_test.cpp", "io/encoder_files_test.cpp",
               "io/files_bad_input_test.cpp"),
}

SOAK = ("attention.cpp", "bounded_reference.cpp", "encoder.cpp", "layer.cpp", "memory.cpp", "soak.cpp", "stream.cpp",
        "training.cpp", "transformer.cpp")

# Linked of these, and run by mpirun.
RANKS_OF = ("main.cpp", "agreement_test.cpp", "attention_test.cpp", "attention_backward_test.cpp", "split_test.cpp",
            "borrow_plan_test.cpp", "mha_forward_test.cpp", "mha_backward_test.cpp", "stack_test.cpp",
            "sixteen_bits_test.cpp", "counted_calls.cpp", "instances.cpp")


def soak(cases, *kinds):
    return tuple(("soak", "--cases", str(cases), "--stop-after", "1", "--only", kind) for kind in kinds)


def units(gtest_filter):
    return (("units", "--gtest_brief=1", "--gtest_fail_fast", "--gtest_filter=" + gtest_filter),)


def whole(program, gtest_filter="*"):
    return ((program, "--gtest_brief=1", "--gtest_fail_fast", "--gtest_filter=" + gtest_filter),)


# Of the tests that take seconds, those of long sequences; of the others, those in float.
QUICK = ("*BadInput*:PublicNames*:Window*:TokenWindows*:PaddingMasks*:Philox*:Attention/float*:UnseenKeys/float*:"
         "Dropout*/float*:AttentionGradients/float.AreThoseOfR*:AttentionGradients/float.AreThoseOfTheD*:Scores*:ASample*:UsedRoom*:"
         "TheOrder*")
ALL_BUT_LONG = ("*:-LayerOptions/*:LayerGradients/*Long*:LayerGradients/*Wide*:AttentionGradients/*Beyond*:"
                "Sliding.WindowsOfMore*:*OfMillions*:*.IsTriedOn*")
LAYER = "Layer*/float*:*BadInput*:Component/float*:Ragged/float*"
SOAK_OF_ALL = soak(3000, "attention") + soak(800, "layer", "stream", "training") + soak(250, "transformer", "encoder")
# Three processes that hold a sequence together, if there is MPI.
RANKS = (("ranks", "--gtest_brief=1", "--gtest_fail_fast"),)
SLOW = SOAK_OF_ALL + units(ALL_BUT_LONG) + units("Sliding.WindowsOfMore*:AttentionGradients/float*Beyond*") + RANKS

PARTS = (
    Part(("core/window.hpp", "attention/token_window.hpp"), 4, "attention",
         soak(500, "attention") + soak(100, "stream", "layer") + units(QUICK), SLOW,
         ("unit/bad_input_test.cpp", "unit/components_test.cpp", "unit/sliding_test.cpp")),
    Part(("attention/*.hpp", "core/lanes.hpp", "core/exp2.hpp", "core/block.hpp", "core/transpose.hpp",
          "ops/multiply.hpp"),
         3, "attention", soak(500, "attention") + soak(100, "stream", "layer") + units(QUICK), SLOW,
         ("unit/bad_input_test.cpp", "unit/sliding_test.cpp", "unit/sixteen_bits_test.cpp",
          "unit/saved_call_test.cpp", "unit/autodiff_test.cpp", "unit/plan_test.cpp", "unit/guarded_memory_test.cpp"),
         sanitized_units=("unit/attention_test.cpp", *BF16)),
    Part(("core/mask.hpp",), 3, "attention", soak(500, "attention") + soak(100, "stream", "layer") + units(QUICK), SLOW,
         ("unit/lifetime_test.cpp", "unit/bad_input_test.cpp")),
    Part(("core/sum.hpp",), 3, "modules", soak(60, "encoder", "transformer") + soak(100, "layer"), SLOW,
         ("unit/precision_test.cpp", "unit/components_test.cpp", "unit/training_test.cpp")),
    Part(("core/task_order.hpp",), 3, "layer", soak(250, "layer"), SLOW, ("unit/plan_test.cpp",)),
    Part(("ops/rotary.hpp",), 3, "attention", soak(500, "attention") + soak(100, "stream", "layer") + units(QUICK), SLOW,
         ("unit/components_test.cpp", "unit/bad_input_test.cpp")),
    Part(("ops/dropout.hpp",), 3, "attention", soak(500, "attention") + units(QUICK), SLOW, ("unit/dropout_test.cpp",)),
    Part(("core/random.hpp",), 3, "training", soak(60, "training") + units("Philox*"), SLOW,
         ("unit/dropout_test.cpp", "unit/initial_weights_test.cpp")),
    Part(("streaming/local_attention_stream.hpp",), 3, "attention", soak(300, "stream"), SLOW,
         ("unit/bad_input_test.cpp", "unit/streaming_test.cpp", "unit/sixteen_bits_test.cpp",
          "unit/streaming_resources_test.cpp")),
    Part(("streaming/stack_stream.hpp", "streaming/streamed_stack.hpp"), 2, "stack",
         soak(60, "transformer", "encoder"), SLOW,
         ("unit/encoder_streaming_test.cpp", "unit/transformer_streaming_test.cpp")),
    Part(("streaming/s*.hpp", "streaming/mha_stream.hpp", "streaming/description.hpp"), 2, "layer",
         soak(300, "stream"), SLOW, ("unit/bad_input_test.cpp", "unit/streaming_test.cpp")),
    Part(("ops/feed_forward*.hpp", "ops/residual_streams*.hpp", "ops/dynamic_position_bias.hpp",
          "ops/rms_norm.hpp", "ops/layer_norm.hpp", "ops/linear*.hpp", "ops/activations.hpp", "core/tanh.hpp"),
         1.5, "modules", soak(60, "encoder", "transformer") + soak(100, "layer") +
         units("Component/float*:AHyper*/float*:*BadInput*"), SLOW,
         ("unit/bad_input_test.cpp", "unit/components_test.cpp", "unit/modules_test.cpp"),
         units("DropoutInTraining/float*")),
    Part(("layer/*.hpp", "ops/packed_weight.hpp", "ops/prenorm.hpp", "ops/qk_norm.hpp"),
         2, "layer", soak(250, "layer") + soak(60, "stream") + units("*BadInput*"),
         SOAK_OF_ALL + units(LAYER) + units("Saved*:RepeatedCalls*:UsedRoom*") + RANKS,
         ("unit/plan_test.cpp", "unit/layer_test.cpp", "unit/gradient_threads_test.cpp", "unit/bad_input_test.cpp"),
         sanitized_units=BF16),
    Part(("ops/row_pass.hpp",), 2, "modules", soak(60, "encoder") + units("Component/float*:*BadInput*"), SLOW,
         ("unit/modules_test.cpp", "unit/bad_input_test.cpp")),
    Part(("ops/project.hpp", "ops/position_arrays.hpp", "ops/weight_gradient.hpp"), 3, "layer",
         soak(250, "layer") + soak(60, "stream"),
         SOAK_OF_ALL + units(LAYER) + units("Saved*:RepeatedCalls*:UsedRoom*"),
         ("unit/sixteen_bits_test.cpp", "unit/modules_test.cpp", "unit/repeated_calls_test.cpp"),
         sanitized_units=BF16),
    Part(("io/dtype.hpp", "io/header_parser.hpp", "io/safetensors_*.hpp", "io/file_kind.hpp", "io/file_bytes.hpp",
          "io/tensor_source.hpp", "io/json.hpp"),
         2.5, "", whole("format", "-*ForEveryValueOfEveryByte"), whole("format") + whole("models"),
         ("io/files_out_of_memory_test.cpp",)),
    Part(("io/state_dict_reader.hpp", "io/state_dict_layout.hpp", "io/tensor_names.hpp", "io/prefix.hpp",
          "io/keyword_arguments.hpp", "io/kwargs.hpp", "io/kwargs_options.hpp", "io/encoder_kwargs.hpp",
          "io/model_config.hpp", "io/rope.hpp", "io/rotary_buffers.hpp", "io/layer_tensors.hpp",
          "io/attention_*.hpp", "io/longformer_layers.hpp", "io/case.hpp"),
         1.5, "", whole("models"), whole("format"),
         ("unit/attention_layers_test.cpp", "unit/longformer_test.cpp")),
)


def part_of(header):
    """The part of a header, named below include/; None: it has no mutants."""
    name = header.removeprefix("local_mha/")
    for part in PARTS:
        if any(fnmatch.fnmatch(name, pattern) for pattern in part.headers):
            return part
    return None


def instances(extern_hpp, group, scalar):
    """A file that compiles a group of the templates that extern.hpp lists, of which the others are elsewhere."""
    body = re.search(r"#define LOCAL_MHA_TEMPLATES\(EXTERN, Scalar\)(.*?)\n\n", extern_hpp, re.S).group(1)
    entries = [re.sub(r"\s+", " ", entry).strip().removeprefix("EXTERN ") + ";"
               for entry in body.replace("\\\n", "\n").split(";") if entry.strip()]
    lines = []
    for entry in entries:
        of = next(name for name, pattern in GROUPS.items() if re.search(pattern, entry))
        lines.append(("" if of == group else "extern ") + re.sub(r"\bScalar\b", scalar, entry))
    return ("#include <local_mha/local_mha.hpp>\nnamespace local_mha::inline LOCAL_MHA_ABI {\n" +
            "\n".join(lines) + "\n}\n")
