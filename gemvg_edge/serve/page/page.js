// The page of `gemvg serve`: pictures are sent once as a scene, then each question is asked of that.

const COLOURS = ["#c2410c", "#0b6bcb", "#15803d", "#9333ea", "#b91c5c", "#0f766e", "#a16207", "#4f46e5"];
const STEPS = 1000; // what a query's boxes count a picture's sides in
const find = (id) => document.getElementById(id);

let pictures = []; // {name, blob, url}
let scene = null; // what the service said of these pictures
let answer = null;
let token = "";
let busy = false;

// What is asked of the service

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  const content = await response.json().catch(() => null);
  const error = new Error(content?.error?.message ?? `The service says ${response.status}.`);
  error.status = response.status;
  if (response.status === 401) {
    find("access").hidden = false;
    find("token").focus();
  }
  throw error;
}

async function look() {
  const form = new FormData();
  for (const picture of pictures) form.append("image", picture.blob, picture.name);
  scene = await call("v1/scenes", { method: "POST", body: form });
}

async function ground(query) {
  const body = JSON.stringify({ queries: [query] });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  return (await call(`v1/scenes/${scene.id}/ground`, options)).answers[0];
}

async function ask(query, shown = query) {
  if (busy) return;
  if (!pictures.length) return say("Pick some pictures first.", true);
  busy = true;
  find("go").disabled = true;
  show(null);
  say(scene ? "Looking for it…" : "Looking at the pictures…");
  const asked = pictures;
  try {
    let found;
    try {
      if (!scene) await look();
      found = await ground(query);
    } catch (error) {
      if (error.status !== 404) throw error; // the scene was let go meanwhile
      await look();
      found = await ground(query);
    }
    if (asked === pictures) show(found, shown);
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
    find("go").disabled = false;
  }
}

// What is shown

function say(text, bad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", bad);
}

function setPictures(next) {
  for (const gone of pictures.filter((picture) => !next.includes(picture))) URL.revokeObjectURL(gone.url);
  if (scene) call(`v1/scenes/${scene.id}`, { method: "DELETE" }).catch(() => {});
  pictures = next;
  scene = null;
  show(null);
  say("");
  find("clear").hidden = !pictures.length;
  find("pictures").replaceChildren(...pictures.map(figure));
}

function add(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/") || file.type === "");
  const found = images.map((blob) => ({ name: blob.name || "picture", blob, url: URL.createObjectURL(blob) }));
  if (!found.length) return say("That was no picture.", true);
  setPictures([...pictures, ...found]);
  find("query").focus();
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function figure(picture, k) {
  const image = make("img", { src: picture.url, alt: `Image ${k + 1}: ${picture.name}` });
  const remove = make("button", { type: "button", textContent: "Remove", ariaLabel: `Remove image ${k + 1}` });
  image.onerror = () => say(`This browser cannot show ${picture.name}; the service may still read it.`, true);
  remove.onclick = () => setPictures(pictures.filter((other) => other !== picture));
  const stage = make("div", { className: "stage" }, image);
  const caption = make("figcaption", {}, make("strong", { textContent: `Image ${k + 1}` }), picture.name, remove);
  return make("li", {}, make("figure", {}, stage, caption));
}

function show(next, shown) {
  answer = next;
  find("answer").hidden = !answer;
  document.querySelectorAll(".box").forEach((box) => box.remove());
  if (!answer) return;
  const { timings } = answer;
  const looked = scene.look_ms ? `${Math.round(scene.look_ms)} ms to look, ` : "";
  const count = answer.boxes.length;
  const notes = [answer.problem, scene.warning && `${scene.warning}; boxes may mean nothing`].filter(Boolean);
  say(
    [`${count || "No"} ${count === 1 ? "box" : "boxes"}`, `${looked}${Math.round(timings.query_prefill_ms + timings.decode_ms)} ms to answer`, ...notes].join(". ") + ".",
    notes.length > 0,
  );
  find("asked").textContent = shown;
  find("hint").hidden = !count || pictures.length < 2;
  find("json").textContent = JSON.stringify(answer, null, 1);
  find("boxes").replaceChildren(...answer.boxes.map(row));
  const stages = document.querySelectorAll(".stage");
  answer.boxes.forEach((box, n) => stages[box.image].append(frame(box, n)));
}

const scoreOf = (box) => (box.score === null ? "" : box.score.toFixed(2));

function choosing(button, box, n) {
  button.style.setProperty("--colour", COLOURS[n % COLOURS.length]);
  button.dataset.box = n;
  button.onclick = () => askSame(box, n);
  for (const [event, chosen] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
    button.addEventListener(event, () =>
      document.querySelectorAll(`[data-box="${n}"]`).forEach((other) => other.classList.toggle("chosen", chosen)),
    );
  return button;
}

function frame(box, n) {
  const { width, height } = answer.images[box.image];
  const button = make("button", { type: "button", className: "box" }, make("span", { textContent: `${n + 1}` }));
  button.ariaLabel = `Box ${n + 1} in image ${box.image + 1}, score ${scoreOf(box) || "unknown"}: ask for the same object`;
  button.title = `${n + 1}: ${scoreOf(box)}`;
  button.style.left = `${(100 * box.x1) / width}%`;
  button.style.top = `${(100 * box.y1) / height}%`;
  button.style.width = `${(100 * (box.x2 - box.x1)) / width}%`;
  button.style.height = `${(100 * (box.y2 - box.y1)) / height}%`;
  button.classList.toggle("high", box.y1 < height / 12); // no room above it for its number
  button.firstChild.textContent = scoreOf(box) ? `${n + 1} · ${scoreOf(box)}` : `${n + 1}`;
  return choosing(button, box, n);
}

function row(box, n) {
  const corners = [box.x1, box.y1, box.x2, box.y2].map(Math.round).join(", ");
  const about = make("small", { textContent: `score ${scoreOf(box) || "unknown"}, pixels ${corners}` });
  const button = make("button", { type: "button" }, make("b", { textContent: `${n + 1}` }), `image ${box.image + 1}`, about);
  return make("li", {}, choosing(button, box, n));
}

function askSame(box, n) {
  const { width, height } = answer.images[box.image];
  const step = (value, side) => Math.min(STEPS, Math.max(0, Math.round((value / side) * STEPS)));
  const corner = (x, y) => `(${step(x, width)},${step(y, height)})`;
  const mark = `<|box_start|>${corner(box.x1, box.y1)},${corner(box.x2, box.y2)}<|box_end|>`;
  const where = `in image ${box.image + 1}`;
  ask(`the same object as ${mark} ${where}`, `the same object as box ${n + 1} ${where} (${answer.query.startsWith("the same object as <|") ? "of the answer before" : answer.query})`);
}

// What people do

find("files").onchange = (event) => {
  add(event.target.files);
  event.target.value = ""; // or the same file could not be picked again
};
find("clear").onclick = () => setPictures([]);
find("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(find("query").value.trim());
};
find("access").onsubmit = (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  find("access").hidden = true;
  say("");
  tellModel();
};
find("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(find("json").textContent);
    find("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(find("json")); // where a page may not write to the clipboard
    find("copy").textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (find("copy").textContent = "Copy"), 2000);
};
find("sample").onclick = async () => {
  const blobs = await Promise.all(["sample-a.png", "sample-b.png"].map(async (name) => {
    const blob = await (await fetch(name)).blob();
    return new File([blob], name, { type: "image/png" });
  }));
  setPictures([]);
  add(blobs);
  find("query").value ||= "all balls";
};

const drop = find("drop");
for (const name of ["dragover", "dragleave", "drop"])
  addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) add(event.dataTransfer.files);
  });
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
addEventListener("pagehide", () => {
  if (scene) call(`v1/scenes/${scene.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
});

// The camera, where the browser lets a page have it: on this machine, or over TLS

find("camera").hidden = !navigator.mediaDevices?.getUserMedia;
find("camera").onclick = async () => {
  try {
    find("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    find("viewfinder").hidden = false;
    find("shoot").focus();
  } catch (error) {
    say(`The camera cannot be used: ${error.message}.`, true);
  }
};
find("shoot").onclick = () => {
  const video = find("video");
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => blob && add([new File([blob], "camera.png", { type: "image/png" })]), "image/png");
};
find("stop").onclick = () => {
  for (const track of find("video").srcObject?.getTracks() ?? []) track.stop();
  find("viewfinder").hidden = true;
};

async function tellModel() {
  try {
    const [model] = (await call("v1/models")).data;
    const many = model.trained_pictures ? ` It was trained on at most ${model.trained_pictures} pictures at once.` : "";
    find("about").textContent = model.shipped
      ? `The small model that ships with gemvg-edge. It knows simulated tables with toys and dishes, seen by one or two cameras, as in the sample; photographs get nonsense. It was made to show that the whole path works.${many}`
      : `The model ${model.id}.${many}`;
    find("sample").hidden = !model.shipped;
  } catch (error) {
    if (error.status !== 401) say(error.message, true);
  }
}
tellModel();
