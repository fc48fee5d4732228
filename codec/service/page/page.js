const $ = id => document.getElementById(id);
// What a file begins with: one of chunks, and one in the brief form.
const MAGICS = [[0x89, 0x43, 0x4c, 0x54, 0x0d, 0x0a, 0x1a, 0x0a], [0x89, 0x63, 0x6c, 0x74]];
const LABELS = { original: "Original", calotype: "Calotype", avif: "AVIF", webp: "WebP", jpeg: "JPEG" };
const ANCHORS = ["avif", "webp", "jpeg"];
const LATENTS = { low: 0.05, high: 2.5 }, TOKENS = { low: 0.008, high: 0.06 };  // ends of the size slider, in bpp
const PACKETS = 10;  // of a tile of tokens, so that the loss slider has something to drop

// A file that was opened, and the pictures that were made of it: source name -> { url, bytes, bpp, psnr, encoding, decoding }.
let subject = null;
let pictures = {};
let work = new AbortController();
let token = "";
let tokenModels = new Set();

// Words ----------------------------------------------------------------------------------------------------------

const fileSize = n => n < 1000 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(2)} MB`;
const duration = ms => ms === undefined ? "–" : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
const say = text => { $("status").textContent = text; };

function complain(text, partial = false) {
  $("error-text").textContent = text;
  $("error").hidden = !text;
  $("partial").hidden = !partial;
}

const sentence = text => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// Service --------------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(problem) { super(problem.detail); this.kind = problem.error; }
}

function askToken() {
  const dialog = $("token-dialog");
  $("token").value = "";
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

async function call(path, query, body, signal) {
  const parameters = new URLSearchParams(query).toString();
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(parameters ? `${path}?${parameters}` : path, { method: body ? "POST" : "GET", body, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service cannot be reached: is it still running?");
  }
  if (response.ok) return response;
  let problem;
  try { problem = await response.json(); } catch { problem = { error: "", detail: `the service answered ${response.status}` }; }
  if (response.status === 401) {
    token = await askToken();
    if (token) return call(path, query, body, signal);
  }
  throw new Refused(problem);
}

function timing(response) {
  const stages = {};
  for (const part of (response.headers.get("Server-Timing") ?? "").split(", ")) {
    const [name, value] = part.split(";dur=");
    stages[name] = Number(value);
  }
  return stages;
}

const facts = response => Object.fromEntries(["Quality", "Bpp", "Psnr"].map(name => {
  const text = response.headers.get(`Calotype-${name}`);
  return [name.toLowerCase(), text === null ? undefined : text === "inf" ? Infinity : Number(text)];
}));

// Opening --------------------------------------------------------------------------------------------------------

async function isStream(file) {
  const head = new Uint8Array(await file.slice(0, 8).arrayBuffer());
  return MAGICS.some(magic => magic.every((byte, i) => head[i] === byte));
}

async function loadable(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function forget(names) {
  for (const name of names) {
    if (pictures[name]) URL.revokeObjectURL(pictures[name].url);
    delete pictures[name];
  }
}

async function open(file) {
  work.abort();
  complain("");
  forget(Object.keys(pictures));
  hideViewer();
  $("download").hidden = true;
  $("results").hidden = true;
  offerLoss(false);
  const stream = await isStream(file);
  const mine = subject = { file, stream, name: file.name.replace(/\.[^.]*$/, "") || "picture", width: 0, height: 0, viewable: false };
  $("subject").textContent = `${file.name}, ${fileSize(file.size)}`;
  $("settings-title").textContent = stream ? "File" : "Encoding";
  $("fields").hidden = stream;
  if (!stream) {
    const url = URL.createObjectURL(file);
    try {
      const image = await loadable(url);
      if (subject !== mine) return;  // another file was opened meanwhile
      Object.assign(subject, { width: image.naturalWidth, height: image.naturalHeight, viewable: true });
      pictures.original = { url, bytes: file.size, bpp: 8 * file.size / (image.naturalWidth * image.naturalHeight) };
      $("subject").textContent += `, ${subject.width} × ${subject.height}`;
    } catch {
      URL.revokeObjectURL(url);  // TIFF, say: the service reads it, this browser does not
    }
  }
  if (subject !== mine) return;
  offerSides();
  showAmount();
  await run(stream ? show : encode);
}

// What a task needs: a signal to stop at, messages, and the bar that says that something is going on.
async function run(task, ...values) {
  work.abort();
  const mine = work = new AbortController();
  complain("");
  $("busy").hidden = false;
  $("stage").setAttribute("aria-busy", "true");
  try {
    await task(mine.signal, ...values);
  } catch (error) {
    if (mine.signal.aborted) return;
    say("");
    const damaged = task === show && ["ChecksumError", "TruncatedError", "DriftError"].includes(error.kind);
    complain(sentence(error.message), damaged);
    draw();
  } finally {
    if (mine === work) {
      $("busy").hidden = true;
      $("stage").removeAttribute("aria-busy");
    }
  }
}

// Work -----------------------------------------------------------------------------------------------------------

const metadata = () => $("keep").checked ? "all" : "icc";
const aim = () => document.querySelector("input[name=aim]:checked").value;
const ofTokens = () => tokenModels.has($("model").value);
function bpp() {
  const { low, high } = ofTokens() ? TOKENS : LATENTS;
  return low * (high / low) ** (Number($("amount").value) / 100);
}
const targetSize = () => Math.round(bpp() * subject.width * subject.height / 8);

async function encode(signal) {
  say("Encoding…");
  const query = { model: $("model").value, metadata: metadata(), measure: true };
  if (aim() === "quality") query.quality = $("amount").value;
  else if (subject.viewable) query.target_size = targetSize();
  else query.target_bpp = bpp().toPrecision(4);
  if (ofTokens()) query.packets = PACKETS;
  const response = await call("encode", query, subject.file, signal);
  const stream = await response.blob();
  const spent = timing(response), known = facts(response);
  subject.width = Number(response.headers.get("Calotype-Width"));
  subject.height = Number(response.headers.get("Calotype-Height"));
  say("Decoding…");
  offerLoss(ofTokens());
  const { url, decoding } = await decode(stream, {}, signal);
  subject.clt = stream;
  forget(["calotype", ...ANCHORS]);
  pictures.calotype = { url, bytes: stream.size, ...known, exact: known.psnr, searched: !("quality" in query), encoding: spent.total - spent.wait - (spent.measure ?? 0), decoding };
  offerDownload(stream);
  await fillSides(signal);
  say(`Encoded to ${fileSize(stream.size)}, ${known.bpp.toFixed(3)} bits per pixel, ${known.psnr.toFixed(2)} dB.`);
}

// The slider of lost packets belongs to one file: another one starts without loss.
function offerLoss(possible) {
  $("loss-field").hidden = !possible;
  $("loss").value = 0;
  showLoss();
}

function showLoss() {
  $("loss-value").textContent = `${$("loss").value} %`;
  $("loss").setAttribute("aria-valuetext", `${$("loss").value} % of the packets lost`);
}

async function lose(signal) {
  say("Decoding…");
  const share = Number($("loss").value) / 100;
  const { url, lost } = await decode(subject.clt, { simulate_loss: share }, signal);
  const picture = pictures.calotype;
  URL.revokeObjectURL(picture.url);
  // The PSNR was measured without loss.
  Object.assign(picture, { url, psnr: share ? undefined : picture.exact });
  draw();
  say(lost ? `Restored without packets ${lost.replaceAll(",", ", ")}.` : "Decoded without loss.");
}

function offerDownload(stream) {
  const link = $("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(stream);
  link.download = `${subject.name}.clt`;
  link.textContent = `Download .clt, ${fileSize(stream.size)}`;
  link.hidden = false;
}

async function decode(stream, query, signal) {
  const response = await call("decode", { format: "png", ...query }, stream, signal);
  const url = URL.createObjectURL(await response.blob());
  await loadable(url);
  const spent = timing(response);
  return { url, decoding: spent.total - spent.wait - spent.write, damaged: response.headers.get("Calotype-Damaged-Tiles"), lost: response.headers.get("Calotype-Lost-Packets") };
}

async function show(signal, partial = false) {
  say("Decoding…");
  const info = await (await call("info", {}, subject.file, signal)).json();
  const { url, decoding, damaged } = await decode(subject.file, { allow_partial: partial }, signal);
  Object.assign(subject, { width: info.width, height: info.height, clt: subject.file });
  offerLoss(info.packets > 1);
  $("subject").textContent = `${subject.file.name}, ${fileSize(subject.file.size)}, ${info.width} × ${info.height}, quality ${info.quality}`;
  pictures.calotype = { url, bytes: info.file_bytes, bpp: info.bpp, quality: info.quality, decoding };
  await fillSides(signal);
  say(damaged ? `Damaged tiles are filled in: ${damaged.replaceAll(",", ", ")}.` : "Decoded.");
}

async function anchor(name, signal) {
  say(`Encoding ${LABELS[name]} at the same size…`);
  const response = await call("compare", { format: name, size: pictures.calotype.bytes, metadata: metadata() }, subject.file, signal);
  const file = await response.blob();
  const url = URL.createObjectURL(file);
  try {
    await loadable(url);
  } catch {
    URL.revokeObjectURL(url);
    throw new Error(`this browser cannot show ${LABELS[name]}`);
  }
  const spent = timing(response);
  pictures[name] = { url, bytes: file.size, ...facts(response), encoding: spent.encode, decoding: spent.decode };
  say(`${LABELS[name]}: ${fileSize(file.size)}, ${pictures[name].psnr.toFixed(2)} dB.`);
}

// Sides ----------------------------------------------------------------------------------------------------------

function offer(select, names, chosen) {
  const old = select.value;
  select.replaceChildren(...names.map(name => new Option(ANCHORS.includes(name) ? `${LABELS[name]}, same size` : LABELS[name], name)));
  select.value = names.includes(old) ? old : chosen;
}

function offerSides() {
  const names = subject.stream ? ["calotype"] : [...(subject.viewable ? ["original"] : []), "calotype", ...ANCHORS];
  offer($("left"), names, names[0]);
  offer($("right"), names, "calotype");
  for (const side of ["left", "right"]) $(side).closest("label").hidden = subject.stream;
}

async function fillSides(signal) {
  draw();  // what is there already need not wait for the rest
  for (const name of new Set([$("left").value, $("right").value])) {
    if (ANCHORS.includes(name) && !pictures[name]) await anchor(name, signal);
  }
  draw();
}

function draw() {
  for (const side of ["left", "right"]) {
    const name = $(side).value, picture = pictures[name];
    const layer = $(`${side}-layer`), image = $(`${side}-image`);
    layer.hidden = !picture;
    if (picture && image.src !== picture.url) image.src = picture.url;
    image.alt = picture ? LABELS[name] : "";
    $(`${side}-tag`).textContent = LABELS[name];
    $(`${side}-tag`).hidden = !picture;
  }
  const one = $("left").value === $("right").value;
  $("split").hidden = one || !pictures[$("left").value] || !pictures[$("right").value];
  if (one) $("left-tag").hidden = true;
  $("empty").hidden = Object.keys(pictures).length > 0;
  $("keys").hidden = $("bar").hidden = !$("empty").hidden;
  $("stage").classList.toggle("loaded", $("empty").hidden);
  if (subject.width && view.subject !== subject) {
    view.subject = subject;
    fit();
  }
  place();
  fillTable();
}

function hideViewer() {
  for (const id of ["left-layer", "right-layer", "left-tag", "right-tag", "split"]) $(id).hidden = true;
  $("empty").hidden = true;
}

function fillTable() {
  const order = ["original", "calotype", ...ANCHORS].filter(name => pictures[name]);
  $("results").hidden = !pictures.calotype;
  $("rows").replaceChildren(...order.map(name => {
    const picture = pictures[name], row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    const setting = picture.quality === undefined ? "" : `, quality ${picture.quality}`;
    head.textContent = name === "original" ? "Original file" : `${LABELS[name]}${setting}`;
    const psnr = picture.psnr === undefined ? "–" : picture.psnr === Infinity ? "exact" : `${picture.psnr.toFixed(2)} dB`;
    const cells = [fileSize(picture.bytes), picture.bpp.toFixed(3), psnr, duration(picture.encoding), duration(picture.decoding)];
    row.append(head, ...cells.map(text => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
  const notes = subject.stream
    ? ["PSNR needs the original, which a .clt file does not hold."]
    : ["PSNR of the decoded 8-bit picture against the original. The other codecs get the quality that ends at or just below the size of the .clt file; each has its own quality scale, and its encoding time is that of one encoding."];
  if (pictures.calotype?.searched) notes.push("Calotype's encoding time is that of the whole search for the size.");
  $("note").textContent = notes.join(" ");
}

// View: scale is in CSS pixels a picture's pixel, x and y are where its corner lies on the stage ---------------------

const view = { scale: 1, x: 0, y: 0, split: 50, subject: null, fitted: true };
const stageSize = () => ({ width: $("stage").clientWidth, height: $("stage").clientHeight });

function fitScale() {
  const { width, height } = stageSize();
  return Math.min(width / subject.width, height / subject.height, 4);
}

function fit() {
  Object.assign(view, { scale: fitScale(), x: 0, y: 0, fitted: true });
  place();
}

function place() {
  if (!subject?.width) return;
  const { width, height } = stageSize();
  const keep = (offset, size, room) => size <= room ? (room - size) / 2 : Math.min(0, Math.max(room - size, offset));
  view.x = keep(view.x, subject.width * view.scale, width);
  view.y = keep(view.y, subject.height * view.scale, height);
  for (const side of ["left", "right"]) {
    const image = $(`${side}-image`);
    // Sizes in picture pixels, so that all sources lie on each other exactly.
    image.style.width = `${subject.width}px`;
    image.style.height = `${subject.height}px`;
    image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
    image.classList.toggle("crisp", view.scale * devicePixelRatio >= 1.99);
  }
  const whole = $("split").hidden;
  $("left-layer").style.clipPath = whole ? "" : `inset(0 ${100 - view.split}% 0 0)`;
  $("right-layer").style.clipPath = whole ? "" : `inset(0 0 0 ${view.split}%)`;
  $("split").style.left = `${view.split}%`;
  $("split").setAttribute("aria-valuenow", Math.round(view.split));
  $("split").setAttribute("aria-valuetext", `${Math.round(view.split)} % ${LABELS[$("left").value] ?? ""}`);
  $("zoom-value").textContent = `${Math.round(100 * view.scale * devicePixelRatio)} %`;
  $("stage").classList.toggle("zoomed", view.scale > fitScale() * 1.001);
}

function zoom(factor, at) {
  if (!subject?.width) return;
  const { width, height } = stageSize();
  const { x, y } = at ?? { x: width / 2, y: height / 2 };
  const low = Math.min(fitScale(), 1 / devicePixelRatio) / 2;
  const scale = Math.min(Math.max(view.scale * factor, low), 32);
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  Object.assign(view, { scale, fitted: false });
  place();
}

const actual = () => zoom(1 / devicePixelRatio / view.scale);

function pan(dx, dy) {
  view.x += dx;
  view.y += dy;
  place();
}

function split(value) {
  view.split = Math.min(100, Math.max(0, value));
  place();
}

const onStage = event => {
  const box = $("stage").getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
};

// Pointers: one moves the picture, two zoom it; the handle has its own.
const pointers = new Map();

$("stage").addEventListener("pointerdown", event => {
  if (event.button !== 0 || !subject?.width || event.target.closest("#split")) return;
  $("stage").setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, onStage(event));
  $("stage").classList.add("panning");
});
$("stage").addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = onStage(event);
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  pointers.set(event.pointerId, now);
  if (other) {
    const gap = p => Math.hypot(p.x - other.x, p.y - other.y);
    zoom(gap(now) / Math.max(gap(before), 1), { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 });
  } else {
    pan(now.x - before.x, now.y - before.y);
  }
});
for (const kind of ["pointerup", "pointercancel"]) {
  $("stage").addEventListener(kind, event => {
    pointers.delete(event.pointerId);
    if (!pointers.size) $("stage").classList.remove("panning");
  });
}

const handle = $("split");
handle.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  handle.setPointerCapture(event.pointerId);
  handle.focus({ focusVisible: false });
  event.preventDefault();
});
handle.addEventListener("pointermove", event => {
  if (handle.hasPointerCapture(event.pointerId)) split(100 * onStage(event).x / stageSize().width);
});

$("stage").addEventListener("wheel", event => {
  if (!subject?.width) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.0015)), onStage(event));
}, { passive: false });

const ZOOM_KEYS = { "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit, 1: actual };
const PAN_KEYS = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
const SPLIT_KEYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -100, End: 100 };

$("stage").addEventListener("keydown", event => {
  if (!subject?.width || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in ZOOM_KEYS) ZOOM_KEYS[event.key]();
  else if (event.target === handle && event.key in SPLIT_KEYS) split(Math.round(view.split) + SPLIT_KEYS[event.key] * (event.shiftKey ? 10 : 1));
  else if (event.target !== handle && event.key in PAN_KEYS) pan(...PAN_KEYS[event.key]);
  else return;
  event.preventDefault();
});

$("zoom-in").addEventListener("click", () => zoom(1.25));
$("zoom-out").addEventListener("click", () => zoom(0.8));
$("zoom-fit").addEventListener("click", () => { if (subject?.width) fit(); });
$("zoom-one").addEventListener("click", actual);

new ResizeObserver(() => {
  if (!subject?.width) return;
  if (view.fitted) fit();
  else place();
}).observe($("stage"));

// Settings -------------------------------------------------------------------------------------------------------

const amounts = { quality: "60", size: "50" };  // each aim remembers where its slider stood

function showAmount() {
  const slider = $("amount");
  let text = slider.value;
  if (aim() === "size") {
    text = `${bpp().toFixed(2)} bpp`;
    if (subject?.width) text = `${fileSize(targetSize())}, ${text}`;
  }
  $("amount-value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

function again() {
  if (subject && !subject.stream) run(encode);
}

let lastAim = "quality";
for (const radio of document.querySelectorAll("input[name=aim]")) {
  radio.addEventListener("change", () => {
    amounts[lastAim] = $("amount").value;
    lastAim = aim();
    $("amount").value = amounts[lastAim];
    $("amount").step = lastAim === "quality" ? 1 : 0.5;
    $("amount-label").textContent = lastAim === "quality" ? "Quality" : "At most";
    showAmount();
    again();
  });
}
$("amount").addEventListener("input", showAmount);
$("amount").addEventListener("change", again);
$("keep").addEventListener("change", again);
$("loss").addEventListener("input", showLoss);
$("loss").addEventListener("change", () => { if (pictures.calotype) run(lose); });
$("settings").addEventListener("submit", event => event.preventDefault());
for (const side of ["left", "right"]) {
  $(side).addEventListener("change", () => { if (pictures.calotype) run(fillSides); else draw(); });
}
$("partial").addEventListener("click", () => run(show, true));

// Files ----------------------------------------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  if ($("file").files[0]) open($("file").files[0]);
  $("file").value = "";  // so that the same file can be chosen again
});
$("empty").addEventListener("click", () => $("file").click());
document.addEventListener("paste", event => {
  const file = event.clipboardData.files[0];
  if (file) open(file);
});
let inside = 0;  // entered less left elements: over 0 while a file is dragged over the page
document.addEventListener("dragenter", () => { inside++; document.body.classList.add("dragging"); });
document.addEventListener("dragleave", () => { if (--inside <= 0) document.body.classList.remove("dragging"); });
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault();
  inside = 0;
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});

// Token ----------------------------------------------------------------------------------------------------------

$("token-form").addEventListener("submit", event => {
  event.preventDefault();
  $("token-dialog").close($("token").value);
});
$("token-cancel").addEventListener("click", () => $("token-dialog").close(""));
$("token-dialog").addEventListener("cancel", event => { event.preventDefault(); $("token-dialog").close(""); });

// Start ----------------------------------------------------------------------------------------------------------

async function start() {
  showAmount();
  const found = await (await call("models")).json();
  const describe = () => { $("model-summary").textContent = found.models.find(m => m.name === $("model").value).summary; };
  tokenModels = new Set(found.models.filter(m => m.architecture === "vqgan").map(m => m.name));
  $("model").replaceChildren(...found.models.map(m => new Option(m.name, m.name, false, m.name === found.default)));
  $("model").addEventListener("change", () => { describe(); showAmount(); again(); });
  describe();
}

start().catch(error => complain(sentence(error.message)));
