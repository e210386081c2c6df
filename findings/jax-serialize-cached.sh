#!/usr/bin/env bash
# jax serialises a CPU program that it has read from its persistent cache without some of the program's functions.
#
# jax 0.10.2 and 0.12.0.1 on a CPU. jax.experimental.serialize_executable.serialize gives bytes for it as for any other,
# only fewer, and deserialize_and_load takes them; the error comes when the program runs. Bytes of the same program that
# was compiled in this process are good. Whoever saves programs must compile them with the cache off.
#
# Output seen:
#   compiled: loads and runs
#   from the cache: NOT_FOUND or INTERNAL, Function ... not found
#
# Exits 0 while this is so, 1 when it is not, 2 where the packages can't be installed.
set -u
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[123].*/bin/python3; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
version=${JAX_VERSION:-0.10.2}
"$python" -m venv "$folder/venv" &&
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version" || exit 2
cat >"$folder/cached.py" <<'PYTHON'
import functools
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **about: hits.append(name) if "cache_hit" in name else None)


def step(weights, x):
    def layer(weights, x, _):
        for weight in weights:
            x = jnp.tanh(x @ weight) + jnp.sin(x).T
        return x, None

    def loss(weights):
        return jax.lax.scan(functools.partial(layer, weights), x, None, length=3)[0].sum()

    return [weight - 0.1 * gradient for weight, gradient in zip(weights, jax.grad(loss)(weights))]


weights = list(jax.random.normal(jax.random.key(0), (4, 64, 64)))
for _ in range(2):
    jax.clear_caches()
    hits.clear()
    compiled = jax.jit(step).lower(weights, weights[0]).compile()
    where = "from the cache" if hits else "compiled"
    wanted = float(compiled(weights, weights[0])[0].sum())
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    try:
        same = float(loaded(weights, weights[0])[0].sum()) == wanted
        print(f"{where}: " + ("loads and runs" if same else "runs, with another result"))
    except jax.errors.JaxRuntimeError as error:
        missing = "Function" in str(error) and "not found" in str(error)
        print(f"{where}: NOT_FOUND or INTERNAL, Function ... not found" if missing else f"{where}: {error}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/cached.py" "$folder/cache" >"$folder/found" 2>"$folder/log" ||
    { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
