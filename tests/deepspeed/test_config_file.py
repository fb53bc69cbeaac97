"""What DeepSpeed's file may not hold: each in one line with file, key and value, instead of a traceback or silence."""

import json

from launching import ROOT, OnRanks, assert_refused

ON_RANKS = OnRanks("tests/deepspeed/config_file_on_ranks.py")
OFFLOADED = {"device": "cpu"}
CASES = [
    # what changes the arithmetic: the script multiplies by the world size
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = "sum"; expected "mean"'),
    ({"gradient_allreduce_op": "SUM"}, 'gradient_allreduce_op = "SUM"; expected "mean"'),
    ({"prescale_gradients": True}, "prescale_gradients = true; expected false"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor = 2.0; expected 1"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients = true changes"),
    ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm = false changes what is"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOADED, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
    # old names
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is an old name; write offload_optimizer"),
    ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, "cpu_offload_param is an old name; write offload"),
    ({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}}, "is an old name; write ga"),
    # sections, and values of a few words
    ({"compile": {"enabled": True}}, "unknown key compile.enabled"),
    ({"checkpoint": {"tag_validation": "sometimes"}}, 'tag_validation = "sometimes"; expected "Ignore", "Warn"'),
    ({"checkpoint": {"tag": 1}}, "unknown key checkpoint.tag"),
    ({"communication_data_type": "float"}, 'communication_data_type = "float"; expected "fp32", "fp16", "bf16"'),
    ({"log_level": "loud"}, 'log_level = "loud"; expected "debug"'),
    ({"comet": {"enabled": True}}, "comet.enabled = true needs the package comet_ml"),
    ({"tensorboard": {"enable": True}}, "unknown key tensorboard.enable; did you mean enabled?"),
    ({"flops_profiler": {"profile_steps": 3}}, "unknown key flops_profiler.profile_steps; did you mean profile_step?"),
    ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step = 0; expected a whole number from 1 on"),
    ({"activation_checkpointing": {"profile": 1}}, "activation_checkpointing.profile = 1; expected true or false"),
    ({"aio": {"block_size": -1}}, "aio.block_size = -1; expected a whole number"),
    ({"data_types": {"grad_accum_dtype": "float32"}}, 'grad_accum_dtype = "float32"; expected "fp32"'),
    ({"timers": {"throughput": {"enable": False}}}, "unknown key timers.throughput.enable"),
    ({"timers": {"through": {}}}, "unknown key timers.through; did you mean throughput?"),
    ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops: Input should be a valid list"),
    ({"steps_per_print": 0}, "steps_per_print = 0; expected a whole number from 1 on"),
    ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown = "yes"; expected true or false'),
    ({"data_efficiency": {"enabled": True}}, 'data_efficiency = {"enabled": true} takes no part here'),
    # numbers, true and false as text
    ({"train_batch_size": "24"}, 'train_batch_size = "24" is text; write 24, without quotes'),
    ({"bf16": {"enabled": "false"}}, 'bf16.enabled = "false" is text; write false, without quotes'),
    ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage = "2" is text'),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, 'reduce_bucket_size = "5e8" is text'),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True"),
    # a key given twice
    ('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}', "zero_optimization"),
    ('{"zero_optimization": {"stage": 3, "stage": 1}}', "stage"),
    # offload that offloads nothing
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}, 'device = "auto" offloads nothing'),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memory": True}}}, "device = null offloads nothing"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": OFFLOADED}}, "device = cpu has no effect at stage 0"),
    ({"zero_optimization": {"stage": 2, "offload_param": OFFLOADED}}, "no effect at stage 2; expected stage 3"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "at stage 3 alone: use cpu"),
]  # fmt: skip


def test_files_that_are_refused(group, tmp_path):
    """All on a rank that is up: no process group, no model. The rank's own exit is in test_train_equality.py."""
    for number, (content, _) in enumerate(CASES):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{number}.json").write_text(text)
    files = [str(tmp_path / f"{number}.json") for number in range(len(CASES))]
    for number, answer in enumerate(group(1)(ON_RANKS.read_each, files)[0]):
        assert_refused([answer], CASES[number][1])
        assert f"{number}.json" in answer[1]


def test_files_that_are_read(group, tmp_path):
    """Those of the lesson, and one with every section."""
    whole = {
        "zero_optimization": {"stage": 3, "offload_param": OFFLOADED, "reduce_bucket_size": "auto"},
        "gradient_allreduce_op": "Mean", "communication_data_type": "bf16", "log_level": "WARNING",
        "train_batch_size": "auto", "gradient_clipping": 1, "steps_per_print": 100, "wall_clock_breakdown": True,
        "checkpoint": {"tag_validation": "WARN"}, "aio": {"block_size": 1048576}, "timers": {"throughput": {}},
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None}, "comms_logger": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": "x", "job_name": "7"}, "compile": {}, "wandb": {},
    }  # fmt: skip
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    files = [*map(str, sorted((ROOT / "deepspeed/configs").glob("zero*.json"))), str(tmp_path / "whole.json")]
    assert [answer for answer in group(1)(ON_RANKS.read_each, files)[0] if answer[0]] == []
