#!/usr/bin/env bash
# jax.checkpoint runs cuDNN's attention again although what attention gives is saved by name.
#
# jax 0.10.2, on a CPU: only traced. A name on the result (checkpoint_name, save_only_these_names) does not reach what the
# kernel's own backward pass keeps, its sums of exponentials; so the policy saves a result that nothing reads, and the
# forward kernel runs a second time. Names on the residuals, set in a custom_vjp around it, help: the last line.
#
# Output seen:
#   nothing saved: 2 forward kernels, 1 backward
#   the result saved by name: 2 forward kernels, 1 backward
#   the residuals saved by name too: 1 forward kernels, 1 backward
#
# Exits 0 while this is so, 1 when it is not, 2 where the packages can't be installed.
set -u
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv "$folder/venv" &&
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 || exit 2
cat >"$folder/case.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

cudnn.check_cudnn_version = lambda: 92_000  # that there is none does not matter to tracing
cudnn.check_compute_capability = lambda *_: True
cudnn.is_cuda_compute_capability_equal = lambda *_: True


def plain(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@jax.custom_vjp
def named(q, k, v):
    return plain(q, k, v)


def save(q, k, v):
    out, back = jax.vjp(plain, q, k, v)
    leaves, tree = jax.tree.flatten(back)
    leaves = [leaf if any(leaf is x for x in (q, k, v)) else checkpoint_name(leaf, "attention") for leaf in leaves]
    return checkpoint_name(out, "attention"), tree.unflatten(leaves)


named.defvjp(save, lambda back, gradient: back(gradient))
policy = jax.checkpoint_policies.save_only_these_names("attention")
x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
for name, attention, saved in (("nothing saved", plain, None), ("the result saved by name", plain, policy),
                               ("the residuals saved by name too", named, policy)):
    def block(x):
        return jnp.square(checkpoint_name(attention(x, x + 1, x + 2), "attention")).sum().astype(jnp.float32)

    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(block, policy=saved)))(x))
    forward, backward = (text.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd"))
    print(f"{name}: {forward} forward kernels, {backward} backward")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/case.py" >"$folder/found" 2>"$folder/log" ||
    { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
