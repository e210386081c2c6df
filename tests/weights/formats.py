"""The table of docs/weights.md: formats, directions, and the tests that hold each against something outside.

`python -m tests.weights.formats` writes the page; a test proves that it is current and that every named test is there.
"""

import dataclasses
import pathlib

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "weights.md"
TEXT = """# Weights: formats and directions

`acejax convert SRC DST --to {bfl,comfy,diffusers,orbax}` turns one format into another and verifies what it wrote;
`acejax.load_mmdit`, `load_autoencoder`, `load_t5`, `load_clip` and `load_lora` read all of those marked *read*, each
recognised by its tensors' names. *Checked by* names the tests (`tests/...::test_...`) and what they hold it against.

This page is written by `python -m tests.weights.formats`.
"""


@dataclasses.dataclass(frozen=True)
class Format:
    """One row; `checks` are (against what, file under tests/, test)."""

    name: str
    read: str
    written: str
    checks: tuple[tuple[str, str, str], ...]


CONVERT, IDENTIFY, EXPORTS, LORA, CROSSING = (f"weights/test_{name}.py" for name in (
    "convert", "identify", "exports", "lora_formats", "convert_lora"))
SECTIONS = {
    "Transformer (FLUX.1-dev 64, FLUX.1-Fill-dev and ACE++ LoRA 384, ACE++ FFT 448 channels)": (
        Format("BFL and ACE++ file (`flux1-fill-dev.safetensors`)", "yes", "`--to bfl`", (
            ("the published 780 names and shapes", "weights/test_keymaps.py",
             "test_full_size_bfl_has_the_published_780_tensors"),
            ("diffusers' velocity", "model/test_parity.py", "test_equals_diffusers"),
            ("itself, bit for bit", CONVERT, "test_bfl_to_diffusers_and_back_is_bit_exact"))),
        Format("ComfyUI's prefix `model.diffusion_model.`", "yes", "`--to comfy`", (
            ("the BFL file, bit for bit", CONVERT, "test_comfy_has_its_prefix_and_is_read_again"),)),
        Format("swift's and scepter's prefix `model.`", "yes", "no", (
            ("the BFL file", "weights/test_load.py", "test_layouts_and_prefixes_are_detected"),)),
        Format("diffusers folder (`transformer/`), in shards with an index", "yes", "`--to diffusers`", (
            ("names and shapes of diffusers' own class on the meta device", "weights/test_keymaps.py",
             "test_full_size_diffusers_has_the_names_of_its_own_class"),
            ("diffusers' `from_pretrained` and velocity", EXPORTS, "test_diffusers_loads_a_converted_transformer"),
            ("the file, bit for bit", CONVERT, "test_shards_with_an_index"))),
        Format("float8 E4M3 and E5M2, alone or with `scale_weight`", "as bfloat16", "`--dtype float8_...`, no scales", (
            ("numpy", IDENTIFY, "test_float8"),)),
        Format("grown inputs, 64 to 384 to 448 channels", "`grow=`", "`--grow`", (
            ("the smaller model's velocity", IDENTIFY, "test_growth_leaves_the_velocity_unchanged"),)),
        Format("GGUF; NF4, GPTQ and other blocks", "refused by name", "no", (
            ("the message", "weights/test_source.py", "test_other_formats_are_named"),
            ("the message", IDENTIFY, "test_block_quantised_weights_are_named")))),
    "Autoencoder": (
        Format("BFL file (`ae.safetensors`), also under `vae.` or `first_stage_model.`", "yes", "`--to bfl`", (
            ("the published 244 names and shapes", "weights/test_tables_autoencoder.py",
             "test_full_size_bfl_has_the_published_244_tensors"),
            ("diffusers' AutoencoderKL: moments and decoded picture", "model/test_autoencoder.py",
             "test_equals_diffusers"),
            ("itself, bit for bit", CONVERT, "test_bfl_to_diffusers_and_back_is_bit_exact"))),
        Format("diffusers folder (`vae/`)", "yes", "`--to diffusers`", (
            ("names and shapes of AutoencoderKL on the meta device", "weights/test_tables_autoencoder.py",
             "test_full_size_diffusers_has_the_names_and_shapes_of_autoencoder_kl"),
            ("diffusers' `from_pretrained` and results", EXPORTS, "test_diffusers_loads_a_converted_autoencoder")))),
    "Text encoders": (
        Format("T5 v1.1 in HF's names (`text_encoder_2/`, `t5xxl_*.safetensors`), either or both embedding twins",
               "yes", "any `--to`", (
            ("names and shapes of transformers' model on the meta device", "weights/test_tables_text.py",
             "test_full_size_is_as_transformers_has_it"),
            ("transformers' T5EncoderModel", "model/test_t5.py", "test_equals_transformers"),
            ("transformers' `from_pretrained`", EXPORTS, "test_transformers_loads_a_written_encoder"),
            ("both twins", IDENTIFY, "test_twins_must_be_one_tensor"))),
        Format("CLIP-L text in HF's names (`text_encoder/`, `clip_l.safetensors`), with or without `text_model.`",
               "yes", "any `--to`", (
            ("names and shapes of transformers' model on the meta device", "weights/test_tables_text.py",
             "test_full_size_is_as_transformers_has_it"),
            ("transformers' CLIPTextModel", "model/test_clip.py", "test_equals_transformers"),
            ("transformers' `from_pretrained`", EXPORTS, "test_transformers_loads_a_written_encoder")))),
    "Any model": (
        Format("a diffusers pipeline's folder", "yes, each part by its loader", "each part", (
            ("every tensor, bit for bit", CONVERT, "test_a_whole_pipeline"),)),
        Format("PyTorch pickles (`.bin`, `.pt`, `.pth`), also in `state_dict` or `model.model`",
               "by `acejax convert`, with torch, weights only", "no", (
            ("the tensors; code in the file is not run", CONVERT, "test_pickles_are_read_without_running_them"),)),
        Format("Orbax folder, or a training run's workdir", "by `acejax convert`", "`--to orbax`", (
            ("the file, bit for bit", CONVERT, "test_orbax_and_back"),
            ("the run's parameters", "train/test_loop.py", "test_a_run_is_exported")))),
    "LoRA": (
        Format("ComfyUI and kohya (`lora_unet_*`), split dims too", "yes", "`--to comfy`", (
            ("the sum of the same factors in every other format", LORA, "test_every_format_adds_the_same"),
            ("itself, bit for bit", LORA, "test_comfy_comes_back_bit_for_bit"),
            ("itself by way of diffusers, through the command", CROSSING, "test_comfy_to_diffusers_and_back"))),
        Format("PEFT and diffusers (`transformer.*.lora_A.weight`), a different A per projection too", "yes",
               "`--to diffusers`", (
            ("diffusers' own LoRA loader and velocity", LORA, "test_diffusers_loads_our_export"),
            ("alpha in the metadata", LORA, "test_alpha_of_peft"),
            ("what every module adds, from and to ComfyUI", CROSSING, "test_a_lossless_crossing_says_so"))),
        Format("BFL (`*.lora_A.weight` in BFL's names)", "yes", "no", (
            ("the sum of the same factors in every other format", LORA, "test_every_format_adds_the_same"),)),
        Format("swift and scepter (`*.lora_A.0_SwiftLoRA.weight`, `.bin` too)", "yes", "no", (
            ("the sum of the same factors in every other format", LORA, "test_every_format_adds_the_same"),
            ("the same through a pickle", LORA, "test_swift_s_bin"),
            ("the ComfyUI file of the same factors", CROSSING, "test_swift_to_comfy"))),
        Format("LoRA bias, DoRA, LyCORIS, norm scales, text encoders' LoRA", "refused by name", "no", (
            ("the message", LORA, "test_mistakes"),)))}


def page() -> str:
    parts = [TEXT]
    for title, rows in SECTIONS.items():
        parts.append(f"## {title}\n\n| format | read | written | checked by | against |\n|---|---|---|---|---|")
        for row in rows:
            for i, (against, file, test) in enumerate(row.checks):
                start = (row.name, row.read, row.written) if i == 0 else ("", "", "")
                parts[-1] += f"\n| {' | '.join(start)} | `{file}::{test}` | {against} |"
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
