"""The flags that name the weights of `acejax edit` and `acejax serve` (`acejax.cli.edit_weights.FLAGS`, and LoRAs)."""

from absl import flags


def define_weights(values: flags.FlagValues) -> None:
    """Add them."""
    def text(name, about):
        flags.DEFINE_string(name, None, about, flag_values=values)

    def switch(name, about):
        flags.DEFINE_boolean(name, False, about, flag_values=values)

    switch("demo", "Use the small weights that come with acejax.")
    text("base", "FLUX.1's folder or hub id, such as black-forest-labs/FLUX.1-Fill-dev: autoencoder, text encoders and "
         "transformer.")
    text("weights", "Another transformer than that of --base: a file, folder, hub id or the workdir of a run; with "
         "--demo a folder of a demo's weights (WORKDIR/weights).")
    flags.DEFINE_multi_string("lora", None, "FILE[:SCALE] of a LoRA; may be given several times.", flag_values=values)
    text("dtype", "Of FLUX's weights and activations: bfloat16, float16 or float32; with --demo always float32.")
    text("eight_bits", "Keep the transformer's kernels as int8 or float8.")
    switch("int8_products", "Multiply kernels that are kept as int8 as they are, with activations rounded token by "
           "token: faster where a chip multiplies int8 faster, and less exact.")
    switch("staged", "For small cards: text encoders and transformer are never in memory together.")
    switch("offload", "Keep on the host what is used once an edit: 6.5 GB of FLUX's transformer.")
    text("tile", "Encode and decode pictures in squares of so many cells of 8 pixels (64), one after the other: less "
         "memory.")
    text("mesh", "Spread the transformer over devices: fsdp=4,tensor=2.")
    text("contour", "The drawing network's file, for contour_repainting.")
    text("depth", "A DPT's folder, for depth_repainting.")
