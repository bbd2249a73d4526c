"""What is read from the text of a compiled program."""

import pytest

from mlm_jax.plan import hlo

TABLES = """
HloModule jit_f, is_scheduled=true, num_partitions=8

FileNames
1 "/home/u/site-packages/jax/_src/api.py"
2 "/home/u/repo/mlm_jax/model/gpt2.py"
3 "/home/u/repo/mlm_jax/sharding.py"
4 "/home/u/own/ablation.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=88 end_line=88 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
4 {file_name_id=4 function_name_id=1 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=1 parent_frame_id=4}
5 {file_location_id=4 parent_frame_id=1}

"""

LOOPS = """
%body (p: (s32[], f32[4], f32[4,8])) -> (s32[], f32[4], f32[4,8]) {
  %p = (s32[], f32[4], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(2)
  %next = s32[] add(%i, %one)
  %x = f32[4] get-tuple-element(%p), index=1
  %y = f32[4] fusion(%x), kind=kLoop, calls=%product, metadata={op_name="jit(f)/transpose(jvp())/dot"}, backend_config={"estimated_cycles":"100"}
  %old = f32[4,8] get-tuple-element(%p), index=2
  %kept = f32[4,8] dynamic-update-slice(%old, %y, %i), metadata={op_name="jit(f)/transpose(jvp())/dus"}
  ROOT %out = (s32[], f32[4], f32[4,8]) tuple(%next, %y, %kept)
}

%condition (q: (s32[], f32[4], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4], f32[4,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%product (a: s8[4]) -> f32[4] {
  %a = s8[4]{0:T(8)S(1)} parameter(0)
  ROOT %c = f32[4] convolution(%a, %a), dim_labels=bf_io->bf
}

%start (s: f32[4]) -> f32[16] {
  %s = f32[4] parameter(0)
  %g1 = f32[16] all-gather(%s), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/jvp(GPT2)/w" stack_frame_id=3}
  ROOT %begun = (f32[4], f32[16], u32[]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (s2: f32[4]) -> f32[16] {
  %s2 = f32[4] parameter(0)
  ROOT %g2 = f32[16] all-gather(%s2), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%done (s3: f32[4]) -> f32[16] {
  %s3 = f32[4] parameter(0)
  %g3 = f32[16] all-gather(%s3), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %ended = f32[16] custom-call(%g3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (s4: f32[4]) -> f32[2] {
  %s4 = f32[4] parameter(0)
  %summed = f32[4] all-reduce(%s4), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%product
  ROOT %part = f32[2] dynamic-slice(%summed), dynamic_slice_sizes={2}
}

ENTRY %main (b: f32[4], z: f32[4,8]) -> f32[4] {
  %b = f32[4] parameter(0)
  %z = f32[4,8] parameter(1)
  %first = s32[] constant(1)
  %init = (s32[], f32[4], f32[4,8]) tuple(%first, %b, %z)
  %loop = (s32[], f32[4], f32[4,8]) while(%init), condition=%condition, body=%body
  %kernel = bf16[4,2]{1,0} custom-call(%b), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/checkpoint/rematted_computation/splash" stack_frame_id=5}
  %f1 = (f32[4], f32[16], u32[]) fusion(%b), kind=kCustom, calls=%start
  %f2 = f32[16] fusion(%b), kind=kCustom, calls=%async_collective_fusion.1
  %f3 = f32[16] fusion(%b), kind=kCustom, calls=%done
  %r = f32[4] all-reduce(%b), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%product
  %t = f32[1] reduce-scatter(%r), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%product
  %u = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%r), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %gradient = f32[4] bitcast(%b), metadata={op_name="jit(f)/transpose(jvp(GPT2))/w" stack_frame_id=2}
  %v = f32[2] fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter, backend_config={"emitter":"SingleInputAllReduceScatterFusion"}
  %room = f32[4,1000] custom-call(), custom_call_target="AllocateBuffer"
  %token = token[] after-all()
  %w = (f32[4], u32[], token[]) send(%gradient, %token), is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",
_xla_megascale_transfer_type="ALL_REDUCE"}
  %w_done = token[] send-done(%w), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sum = f32[4] add(%b, %b), metadata={op_name="jit(f)/add" stack_frame_id=4}, backend_config={"estimated_cycles":"7"}
}
"""


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.Program(TABLES + LOOPS)


def test_the_cycles_of_a_loop_count_as_often_as_it_goes_round(program):
    assert program.cycles() == {("backward", "head and loss"): 4 * 100, ("update", "other"): 7}  # i = 1, 3, 5, 7
    assert program.products() == {"s8 x s8": 4 * 100}
    with pytest.raises(ValueError, match="not counted"):
        hlo.Program(LOOPS.replace("direction=LT", "direction=NE")).cycles()


def test_an_exchange_is_counted_once_however_often_it_is_written(program):
    found = {one.kind: one for one in program.collectives()[:-2]}
    assert list(found) == ["all-gather", "all-reduce", "reduce-scatter", "collective-permute"]
    # What the gather gives, and what the others take, of float32.
    assert {kind: (one.times, one.bytes, one.hidden) for kind, one in found.items()} == {
        "all-gather": (1, 64, True),
        "all-reduce": (1, 16, False),
        "reduce-scatter": (1, 16, False),
        "collective-permute": (1, 16, True),
    }
    assert found["all-gather"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found["all-reduce"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found["reduce-scatter"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert found["collective-permute"].groups == ((0, 1), (1, 0))


def test_an_all_reduce_of_which_each_keeps_its_part_is_a_reduce_scatter_of_what_it_reads(program):
    one = program.collectives()[-2]
    assert (one.kind, one.bytes, one.groups) == ("reduce-scatter", 16, ((0, 1), (2, 3)))
    assert (one.phase, one.source) == ("backward", "mlm_jax/model/gpt2.py:88")


def test_what_goes_between_slices_by_way_of_hosts_is_an_exchange_of_each_device_with_its_likes(program):
    one = program.collectives()[-1]
    assert (one.kind, one.bytes, one.phase, one.hidden) == ("all-reduce", 16, "backward", True)
    assert one.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_groups_written_as_a_transposed_count_are_those_of_numpy():
    """[[0, 1, 2, 3], [4, 5, 6, 7]] transposed is [[0, 4], [1, 5], ...], in rows of four 0 4 1 5 and 2 6 3 7."""
    assert hlo.groups("replica_groups=[2,4]<=[2,4]T(1,0)", 8) == ((0, 4, 1, 5), (2, 6, 3, 7))
    assert hlo.groups("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", 8) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert hlo.groups("source_target_pairs={}", 8) == ()


def test_without_groups_all_devices_take_part_and_groups_that_are_not_known_are_an_error():
    """Source: openxla.org/xla/operation_semantics, all-reduce: empty replica_groups are one of all."""
    assert hlo.groups("channel_id=1, replica_groups={}, to_apply=%add", 4) == ((0, 1, 2, 3),)
    for text in ("replica_groups=whatever", '_xla_megascale_target="{1,2}x{0,2,4}"'):
        with pytest.raises(ValueError, match="not read"):
            hlo.groups(text, 8)


def test_groups_of_a_mesh_whose_devices_are_reordered_are_those_of_its_axes():
    """The devices 0 4 1 5 2 6 3 7 as a mesh of 4 x 2, as which XLA writes the rows of one of 2 x 4."""
    reordered = "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) "
    assert hlo.groups(reordered + "{'a'}", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert hlo.groups(reordered + "{'c'}", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert hlo.groups("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", 4) == ((3, 1), (2, 0))
    with pytest.raises(ValueError, match="not read"):
        hlo.groups("replica_groups=mesh['a'=2], device_ids=(what?) (else) {'a'}", 8)


def test_the_line_is_the_innermost_of_the_model_or_the_experiment(program):
    """Frame 3 is in sharding.py, called from gpt2.py, called from JAX; 5 is in a file of a user, called from JAX."""
    gather = program.collectives()[0]
    assert (gather.source, gather.phase) == ("mlm_jax/model/gpt2.py:88", "forward")
    assert program.kernels() == {("kernel", "recomputed", "ablation.py:5"): 1}
    root = program.computations["main"]["sum"]
    assert program.line(root) == "mlm_jax/model/gpt2.py:88" and program.line(program.computations["main"]["r"]) == ""


def test_what_a_loop_writes_row_by_row_is_told_from_what_it_carries(program):
    assert program.stacked() == {"backward": 4 * 8 * 4}
    taken_out = LOOPS.replace("limit = s32[] constant(8)", "limit = s32[] constant(6)")  # of the four times one goes before the loop
    assert hlo.Program(TABLES + taken_out).stacked() == {"backward": 4 * 8 * 4}


def test_the_largest_arrays_are_those_that_instructions_make_in_the_devices_memory(program):
    assert [(size, shape) for size, shape, _, _ in program.arrays()][:2] == [(128, "f32[4,8]"), (64, "f32[16]")]
    assert not any(shape == "f32[4,1000]" for _, shape, _, _ in program.arrays()), "what the others write into"
    assert hlo.array_bytes("(bf16[8,4]{1,0}, pred[3], s4[8], f8e4m3fn[2,2], f32[])") == 64 + 3 + 4 + 4 + 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("jit(train_step)/jvp(GPT2)/while/body/closed_call/blocks.<lambda>/blocks/attention/BTD,DNH->BTNH/dot_general", ("forward", "attention")),
        ("jit(f)/transpose(jvp(GPT2))/while/body/checkpoint/rematted_computation/blocks/norm_2/mul", ("recomputed", "norm")),
        ("jit(f)/transpose(jvp(GPT2))/while/body/checkpoint/blocks/mlp/dot_general", ("backward", "mlp")),
        ("jit(f)/jvp(GPT2)/GPT2.head/BTD,VD->BTV/dot_general", ("forward", "head and loss")),
        ("jit(f)/jvp()/reduce_sum", ("forward", "head and loss")),
        ("jit(f)/jvp(GPT2)/gather", ("forward", "embedding")),
        ("jit(f)/mul", ("update", "other")),
    ],
)
def test_a_path_says_the_phase_and_the_part(path, expected):
    assert (hlo.phase(path), hlo.part(path)) == expected
