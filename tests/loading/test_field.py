"""Loading failures of other projects, by number, and the tests that show they cannot happen here."""

from pathlib import Path

# Number -> where it happened and what went wrong, and the test.
FIELD = {
    1: ("vLLM #38684: KeyError weight_scale_inv, as names are rewritten by substring", "recognition::parse_projection"),
    2: ("vLLM #38684: wk_weights_proj_weights_proj for a fused checkpoint", "encodings::load_fused_matrix"),
    3: ("vLLM #42944: KeyError on a layer of another pipeline rank", "assembly::offer_ignores_other_tensors"),
    4: ("vLLM #57639: the same in a copy of the loader for another prefix", "recognition::parse_projection"),
    5: ("vLLM #46078: rows stay uninitialized in a streaming load", "assembly::any_encodings_in_any_order"),
    6: ("vLLM 0.33.0: the same in glm5next, hy_v4 and MTP models", "plan::mtp_layers_by_their_own_name"),
    7: ("vLLM 0.33.0: a scale never comes", "recognition::no_tensor_of_an_encoding_is_optional"),
    8: ("vLLM 0.33.0: a scale beside a BF16 wk is kept forever", "assembly::stray_tensor_in_any_order"),
    9: ("vLLM 0.33.0: a scale of an aborted update", "assembly::failed_or_abandoned_load_leaves_nothing_behind"),
    10: ("SGLang: wk and its scale in different buckets of an update", "assembly::any_encodings_in_any_order"),
    11: ("SGLang, Run:ai streamer: waiting tensors are overwritten", "assembly::any_encodings_in_any_order"),
    12: ("vLLM #45895: index_topk_freq with indexers in all layers", "plan::weights_of_layers_that_share"),
    13: ("vLLM 0.33.0: the same in models/deepseek_v32", "assembly::offer_ignores_other_tensors"),
    14: ("vllm-ascend #11363: skipped layers have weights in GLM-5.1, not in GLM-5.2", "plan::schedules_that_fit"),
    15: ("vllm-ascend #12901: quantization looked up for absent indexers", "encodings::quantization_config_is_ignored"),
    16: ("mlx-lm #1418: GLM-5.2 'Missing 285 parameters'", "plan::schedules_that_fit"),
    17: ("vLLM, ATOM, prime-rl: four ways to read the schedule", "plan::schedules_that_disagree"),
    18: ("sglang #29339: memory for layers without weights", "plan::load_reads_and_allocates_only_its_bytes"),
    19: ("sglang #40285: the MTP layer loads into the main model", "plan::mtp_layers_by_their_own_name"),
    20: ("ATOM #835: MTP without fusion, K not contiguous", "assembly::any_encodings_in_any_order"),
    21: ("TensorRT-LLM #18658: the scale is dropped", "recognition::no_tensor_of_an_encoding_is_optional"),
    22: ("Megatron-Bridge #5851: FP8 cast without its scales", "assembly::any_encodings_in_any_order"),
    23: ("vLLM 0.33.0: e4m3fnuz codes copied as values", "encodings::load_wk_and_gate"),
    24: ("sglang #28455: 0x80 is NaN in e4m3fnuz", "values::bad_value"),
    25: ("miles #1928: scales packed in int32 [N, K/512]", "encodings::load_wk_and_gate"),
    26: ("vLLM 0.33.0: any shape that divides is a block", "recognition::tensors_that_fit_no_encoding"),
    27: ("SGLang: MXFP8 exponents under weight_scale_inv used as factors", "encodings::load_scale_under_any_name"),
    28: ("vLLM 0.33.0 glm5next: exponents of blocks", "encodings::load_scale_under_any_name"),
    29: ("vLLM #54556: Quark renames weight_scale_inv", "encodings::load_scale_under_any_name"),
    30: ("SGLang: .weight_scale taken for a weight", "recognition::tensors_that_fit_no_encoding"),
    31: ("llm-compressor #2512: KeyError weights_proj.weight_packed", "producers::format"),
    32: ("vLLM #41108: NVFP4 in a BF16 model", "encodings::load_wk_and_gate"),
    33: ("vLLM 0.33.0: weight_scale_2 overwrites weight_scale", "assembly::any_encodings_in_any_order"),
    34: ("vLLM 0.33.0: IndexError for a scalar scale", "encodings::load_wk_and_gate"),
    35: ("vLLM 0.33.0: codes of an FP8 gate copied before the KeyError", "assembly::failed_load_changes_nothing"),
    36: ("ATOM #439: an ignore list names no tensor", "encodings::quantization_config_is_ignored"),
    37: ("sglang-jax #1111: N = 128 taken for too narrow", "encodings::load_wk_and_gate"),
    38: ("vllm-ascend #15346: the last block of rows lost", "encodings::load_wk_and_gate"),
    39: ("vLLM #30036: weights_proj.bias", "recognition::tensors_that_fit_no_encoding"),
    40: ("vLLM #57532: a scale that is still NaN", "values::bad_value"),
    41: ("vLLM 0.33.0: half a reload reaches live weights", "assembly::failed_load_changes_nothing"),
    42: ("vLLM 0.33.0 glm5next: a stale fp32 copy", "assembly::reload_keeps_memory"),
    43: ("sglang #30761: repacked scales taken for raw ones", "assembly::reload_keeps_memory"),
    44: ("sglang #38616: names dropped without a word", "checkpoint::no_checkpoint"),
    45: ("vLLM 0.33.0: an update under fused names", "assembly::reload_keeps_memory"),
    46: ("LoRA on a fused parameter: there are no adapters and no parameters to attach one to", None),
    47: ("vLLM #53503: 'uses empty padding' for a missing scale", "recognition::no_tensor_of_an_encoding_is_optional"),
    48: ("llama.cpp #25407: indexers in all layers of GLM-5.2", "plan::weights_of_layers_that_share"),
    49: ("vLLM #38665: a fused FP8 tensor", "encodings::load_fused_matrix"),
}


def test_field():
    assert list(FIELD) == list(range(1, 50))
    for _, test in FIELD.values():
        file, _, name = (test or "field::field").partition("::")
        assert f"\ndef test_{name}(" in (Path(__file__).parent / f"test_{file}.py").read_text(), test
