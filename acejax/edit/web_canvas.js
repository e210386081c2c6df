// Painting over a picture. `props.value` is what the server shows, JSON {picture, mask} of data URLs, until something
// is painted; then it is the mask alone, a PNG data URL, opaque where painted.
const strokes = document.createElement("canvas");
let picture = null, last = null;
const find = (name) => element.querySelector(name);

function draw() {
  const canvas = find("canvas"), brush = canvas.getContext("2d");
  element.querySelector(".paper").classList.toggle("empty", !picture);
  if (!picture) return;
  if (canvas.width !== strokes.width || canvas.height !== strokes.height) {
    canvas.width = strokes.width; canvas.height = strokes.height;
  }
  brush.globalAlpha = 1; brush.drawImage(picture, 0, 0, canvas.width, canvas.height);
  brush.globalAlpha = 0.6; brush.drawImage(strokes, 0, 0);
}

function loaded(url) {
  return new Promise((done) => {
    if (!url) return done(null);
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => done(null);
    image.src = url;
  });
}

async function show() {
  if (props.value && !props.value.startsWith("{")) return;  // our own strokes
  const given = props.value ? JSON.parse(props.value) : {};
  const mask = await loaded(given.mask);
  picture = await loaded(given.picture);
  strokes.width = picture ? picture.width : 1; strokes.height = picture ? picture.height : 1;
  if (mask) strokes.getContext("2d").drawImage(mask, 0, 0, strokes.width, strokes.height);
  draw();
}

function place(event) {
  const box = find("canvas").getBoundingClientRect();
  return [(event.clientX - box.left) * strokes.width / box.width, (event.clientY - box.top) * strokes.height / box.height];
}

function stroke(event) {
  const brush = strokes.getContext("2d"), [x, y] = place(event), size = Number(find(".size").value);
  brush.globalCompositeOperation = find(".erase").checked ? "destination-out" : "source-over";
  brush.strokeStyle = "#ff2d6f"; brush.lineWidth = size; brush.lineCap = brush.lineJoin = "round";
  brush.beginPath(); brush.moveTo(...(last || [x, y])); brush.lineTo(x, y + 0.01); brush.stroke();
  last = [x, y];
  draw();
}

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS" || !picture) return;
  event.preventDefault(); event.target.setPointerCapture(event.pointerId); stroke(event);
});
element.addEventListener("pointermove", (event) => { if (last) stroke(event); });
for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => {
  if (!last) return;
  last = null; props.value = strokes.toDataURL("image/png"); setTimeout(draw);
});
element.addEventListener("click", (event) => {
  if (!event.target.classList.contains("clear") || !picture) return;
  strokes.getContext("2d").clearRect(0, 0, strokes.width, strokes.height);
  props.value = strokes.toDataURL("image/png"); setTimeout(draw);
});
watch("value", show);
show();
