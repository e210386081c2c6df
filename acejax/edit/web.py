"""The web page: upload a picture, paint where to change it, say what to make; the result stands beside it.

It speaks to no other machine: no analytics, no fonts or scripts from elsewhere, no tunnel.
"""

import contextlib
import dataclasses
import functools
import hashlib
import html
import os
import pathlib
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from acejax.data import resize
from acejax.edit import files, record, web_form, web_mask
from acejax.edit.editor import Editor
from acejax.edit.record import File
from acejax.edit.request import MOST_SEED
from acejax.edit.tasks import NONE
from acejax.edit.web_form import Form, Limits
from acejax.edit.web_guard import BodyLimit
from acejax.edit.web_mask import SCRIPT, SIDE, TEMPLATE, painted
from acejax.errors import UserError
from acejax.parallel import memory

AUTO = "by what is given"
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".jp2"]
CSS = pathlib.Path(__file__).with_name("web.css")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A filled-in form: `image`, `references` are pictures [h, w, 3] uint8, `mask` [h, w] uint8."""

    task: str
    prompt: str
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """What a page shows and takes.

    Attributes:
      editor: makes the edits, one after another.
      about: of the weights, in Markdown.
      examples: to begin with.
      opened, used: of the weights, for the record that a result keeps (`acejax.edit.record`).
    """

    editor: Editor
    about: str = ""
    examples: Sequence[Example] = ()
    limits: Limits = Limits()
    opened: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    used: Sequence[File] = ()


@contextlib.contextmanager
def serving(site: Site, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """The page's address while it is served; its files are gone afterwards. Port 0: any that is free.

    Raises:
      UserError: the address can't be had.
    """
    with tempfile.TemporaryDirectory(prefix="acejax-serve-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        past = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")  # Gradio looks at its own page before it begins
        if past != "*":
            os.environ["no_proxy"] = ",".join(filter(None, (past, host, "localhost", "127.0.0.1")))
        from gradio import themes
        from starlette.middleware import Middleware

        page = build(site, folder)
        limits = site.limits
        most = (limits.references + 1) * limits.megabytes * 2**20
        font = [themes.Font("system-ui"), themes.Font("sans-serif")]
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port or _free(host), share=False, prevent_thread_lock=True, quiet=True,
                inbrowser=False, ssr_mode=False, footer_links=[], run_history=False, pwa=False, show_error=False,
                max_file_size=limits.megabytes * 2**20, enable_monitoring=False, mcp_server=False,
                theme=themes.Soft(primary_hue="rose", font=font).set(
                    block_border_width="1px", block_border_color="*border_color_primary"), css=CSS.read_text(),
                app_kwargs={"middleware": [Middleware(BodyLimit, most=most)]})
        except OSError as error:
            raise UserError(f"--host={host} --port={port} can't be served on: {error}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def build(site: Site, folder: str) -> Any:
    """The page as Gradio's Blocks; results are written in a folder."""
    import gradio as gr

    profile, limits = site.editor.profile, site.limits
    told = _told(gr)

    def tell(chosen: str):
        if chosen == AUTO:
            return ("The first task that takes what you give.", *[gr.update(visible=True)] * 3)
        task = profile.tasks[chosen]
        shown = task.image != NONE, task.mask != NONE, task.references != (0, 0)
        return web_form.takes(task), *(gr.update(visible=there) for there in shown)

    @told
    def show(path: str | None):
        return "" if path is None else painted(web_form.preview(path, SIDE, limits)), None  # nor another one's mask

    @told
    def edit(chosen, prompt, picture, canvas, mask, references, seed, steps, guidance, scale, width, height,
             grow, progress=gr.Progress()):  # noqa: B008 - Gradio's way to ask for one
        form = Form(prompt or "", None if chosen == AUTO else chosen, picture, web_mask.read(canvas),
                    mask, tuple(path for path, _ in references or ()), seed, steps, guidance, scale, width, height,
                    grow)
        made, mask_file, text = _edit(site, form, folder, lambda what, share: progress(share, desc=what))
        return (made, gr.update(value=made, visible=True), gr.update(value=mask_file, visible=mask_file is not None),
                text)

    with gr.Blocks(title="acejax", analytics_enabled=False, delete_cache=(600, limits.kept), fill_width=True) as page:
        gr.Markdown(f"# acejax\nEdit a picture by instruction: give a picture, paint over what is to change, say what "
                    f"you want.\n\n{site.about}", elem_id="about")
        with gr.Row(elem_id="examples", visible=bool(site.examples)):
            buttons = [gr.Button(f"{one.task}: “{one.prompt}”", size="sm", elem_classes="example")
                       for one in site.examples]
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=420):
                with gr.Group() as image_part:
                    picture = gr.File(label=f"Picture (up to {limits.megabytes} MB)", file_types=PICTURES,
                                      height=150, elem_id="picture")
                with gr.Group() as mask_part:
                    canvas = gr.HTML("", label="Paint over what is to change", show_label=True, container=True,
                                     html_template=TEMPLATE, js_on_load=SCRIPT.read_text(), elem_id="canvas",
                                     apply_default_css=False)
                    with gr.Accordion("A mask from a file instead", open=False):
                        mask = gr.File(label="Mask of the picture's size, white where to change", height=150,
                                       file_types=PICTURES, elem_id="mask")
                with gr.Group() as reference_part:
                    references = gr.Gallery(label=f"References (up to {limits.references}, in the prompt's order)",
                                            type="filepath", file_types=PICTURES, columns=4, height=170,
                                            interactive=True, object_fit="contain", buttons=[], elem_id="references")
            with gr.Column(scale=1, min_width=420):
                chosen = gr.Dropdown([AUTO, *profile.tasks], value=AUTO, label="Task", elem_id="task")
                takes = gr.Markdown("The first task that takes what you give.", elem_id="takes")
                prompt = gr.Textbox(label="What to make", lines=2, max_lines=4, elem_id="prompt",
                                    placeholder=site.examples[0].prompt if site.examples else "a red bicycle")
                run = gr.Button("Make it", variant="primary", elem_id="run")
                result = gr.Image(label="Result", type="filepath", format="png", interactive=False, height=500,
                                  buttons=["fullscreen"], elem_id="result")
                facts = gr.Markdown(elem_id="facts")
                with gr.Row():
                    save = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                    save_mask = gr.DownloadButton("Download its mask", visible=False, elem_id="download-mask")
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        seed = gr.Number(0, label="Seed: the same gives the same", precision=0, elem_id="seed")
                        other = gr.Button("Another seed", size="sm")
                    with gr.Row():
                        steps = gr.Number(None, label="Steps", precision=0, placeholder=str(profile.steps))
                        guidance = gr.Number(None, label="Guidance", visible=profile.guidance is not None,
                                             placeholder=f"{profile.guidance}")
                        scale = gr.Number(None, label="Repainting scale, 0 to 1", placeholder="the task's")
                        grow = gr.Number(None, label="Grow the mask by, in pixels", precision=0, placeholder="0")
                    with gr.Row():
                        width = gr.Number(None, label="Width", precision=0, placeholder="the picture's")
                        height = gr.Number(None, label="Height", precision=0, placeholder="the picture's")
        chosen.change(tell, chosen, [takes, image_part, mask_part, reference_part], queue=False,
                      show_progress="hidden", api_visibility="private")
        gr.on([picture.upload, picture.clear], show, picture, [canvas, mask], api_visibility="private")
        other.click(lambda: random.randint(0, MOST_SEED), None, seed, queue=False, api_visibility="private")
        gr.on([run.click, prompt.submit], edit,
              [chosen, prompt, picture, canvas, mask, references, seed, steps, guidance, scale, width, height,
               grow],
              [result, save, save_mask, facts], concurrency_limit=1, show_progress_on=result, trigger_mode="once",
              api_name="edit")
        for button, example in zip(buttons, site.examples, strict=True):
            button.click(_filled(example, folder), None, [chosen, prompt, picture, canvas, references, mask, scale,
                                                          grow, width, height], api_visibility="private")
    return page.queue(max_size=limits.waiting)


def _edit(site: Site, form: Form, folder: str, say: Callable[[str, float], None]) -> tuple[str, str | None, str]:
    """Make an edit: the file of its result, of its mask where that was painted, and what there is to say."""
    start = time.time()
    asked = web_form.read(site.editor.profile, form, site.limits)
    colors = files.colors(form.picture) if asked.request.image is not None else None
    with memory.told(lambda: "a smaller picture or fewer references need less"):
        result = site.editor.edit([asked.request], asked.options, say)[0]
    place = pathlib.Path(tempfile.mkdtemp(dir=folder))
    name = f"acejax-{result.task}-{asked.request.seed}"
    used, mask = [*asked.files, *site.used], None
    if asked.painted:
        digest = hashlib.sha256(asked.request.mask.tobytes()).hexdigest()  # each mask keeps its name where it is saved
        mask = str(place / f"acejax-mask-{digest[:8]}.png")
        Image.fromarray(asked.request.mask).save(mask)
        used.append(File("mask", f"./{pathlib.Path(mask).name}", files.hashed_mask(mask, result.picture.shape[:2])[1]))
    about = record.make(site.editor.profile, asked.request, asked.options, result, (0, 1), site.opened, used)
    files.write_picture(place / f"{name}.png", result.picture, {record.KEY: about.text()}, colors)
    return str(place / f"{name}.png"), mask, web_form.about(result, asked, time.time() - start)


def _told(gr: Any) -> Callable[[Callable], Callable]:
    """A user's mistake becomes the page's message, as plain text."""
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except UserError as error:
                raise gr.Error(html.escape(str(error), quote=False), duration=None, title="Not done",
                               print_exception=False) from error
        return wrapped
    return decorate


def _filled(example: Example, folder: str) -> Callable[[], tuple]:
    """A function that fills the form with an example."""
    def fill():
        place = pathlib.Path(tempfile.mkdtemp(dir=folder))

        def kept(name: str, picture: np.ndarray) -> str:
            Image.fromarray(picture).save(place / name)
            return str(place / name)

        image, shown = None, ""
        if example.image is not None:
            image = kept("example.png", example.image)
            size = np.array(example.image.shape[:2])
            small = tuple(int(length) for length in np.maximum(1, np.rint(size * SIDE / size.max())))
            shown = painted(resize.antialiased(example.image, small),
                            None if example.mask is None else resize.mask(example.mask, small))
        references = [kept(f"reference{at}.png", one) for at, one in enumerate(example.references, 1)]
        return example.task, example.prompt, image, shown, references or None, *[None] * 5
    return fill


def _free(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]
