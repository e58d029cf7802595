// The page of `gemvg serve`: pictures are sent once as a scene, then each question is asked of that.

const COLOURS = ["#c2410c", "#0b6bcb", "#15803d", "#9333ea", "#b91c5c", "#0f766e", "#a16207", "#4f46e5"];
const STEPS = 1000; // what a query's boxes count a picture's sides in
const find = (id) => document.getElementById(id);

let pictures = []; // {name, blob, url}
let scene = null; // what the service said of these pictures
let answer = null;
let current = null; // the answer that is shown: {answer, shown, source}, where `source` is what a box of it asked from
let most = 8; // pictures at once
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

const forget = (one) => call(`v1/scenes/${one.id}`, { method: "DELETE", keepalive: true }).catch(() => {});

async function look(asked) {
  const form = new FormData();
  for (const picture of asked) form.append("image", picture.blob, picture.name);
  const made = await call("v1/scenes", { method: "POST", body: form });
  if (asked === pictures) scene = made;
  else forget(made); // others were picked meanwhile
}

async function ground(query) {
  const body = JSON.stringify({ queries: [query] });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  return (await call(`v1/scenes/${scene.id}/ground`, options)).answers[0];
}

async function ask(query, shown = query, source = null) {
  if (busy) return;
  if (!pictures.length) return say("Pick some pictures first.", true);
  if (!query) return say("Type what you are looking for.", true);
  const asked = pictures;
  const again = (error) => {
    if (error.status !== 404) throw error; // the scene was let go meanwhile
    scene = null;
  };
  busy = true;
  find("go").setAttribute("aria-disabled", "true"); // not disabled, which would take the focus away
  say(scene ? "Looking for it…" : "Looking at the pictures…");
  try {
    let found = null;
    for (let tries = 0; tries < 2 && !found; tries++) {
      if (!scene) await look(asked);
      if (asked !== pictures) return say("");
      found = await ground(query).catch(again);
    }
    if (asked === pictures && found) show(found, shown, source);
  } catch (error) {
    if (asked === pictures) show(null);
    say(named(error.message, asked), true);
  } finally {
    busy = false;
    find("go").removeAttribute("aria-disabled");
  }
}

// The service knows pictures by their places; people by their names.
const named = (text, asked) => text.replace(/images\[(\d+)\]/g, (all, k) => asked[k]?.name ?? all);

// What is shown

function say(text, bad = false, warning = "") {
  find("status").replaceChildren(text, ...(warning ? [" ", make("span", { className: "warning", textContent: warning })] : []));
  find("status").classList.toggle("bad", bad);
}

function setPictures(next) {
  for (const gone of pictures.filter((picture) => !next.includes(picture))) URL.revokeObjectURL(gone.url);
  if (scene) forget(scene);
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
  if (pictures.length + found.length > most) return say(`That is too many: at most ${most} pictures at once.`, true);
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
  remove.onclick = () => {
    setPictures(pictures.filter((other) => other !== picture));
    (document.querySelectorAll("figcaption button")[k] ?? find("files")).focus();
  };
  const stage = make("div", { className: "stage" }, image);
  const caption = make("figcaption", {}, make("strong", { textContent: `Image ${k + 1}` }), picture.name, remove);
  return make("li", {}, make("figure", {}, stage, caption));
}

function show(next, shown, source = null) {
  answer = next;
  find("answer").hidden = !answer;
  document.querySelectorAll(".box").forEach((box) => box.remove());
  if (!answer) return;
  const { timings } = answer;
  const count = answer.boxes.length;
  const many = `${pictures.length} ${pictures.length === 1 ? "picture" : "pictures"}`;
  const took = Math.round(timings.query_prefill_ms + timings.decode_ms);
  const notes = [answer.problem, scene.warning && `${scene.warning}; boxes may mean nothing`].filter(Boolean);
  const told = count ? `${count} ${count === 1 ? "box" : "boxes"} in ${many}` : `Nothing found in ${many}`;
  const times = `answered in ${took} ms, pictures read in ${Math.round(scene.look_ms)} ms`;
  say(`${told}; ${times}.`, false, notes.length ? `${named(notes.join(". "), pictures)}.` : "");
  find("asked").textContent = shown;
  find("back").hidden = !source;
  find("back").textContent = source ? `Back to “${source.shown}”` : "";
  find("back").onclick = () => source && show(source.answer, source.shown, source.source);
  current = { answer, shown, source };
  find("hint").hidden = !count || pictures.length < 2;
  find("json").textContent = JSON.stringify(answer, null, 1);
  find("boxes").replaceChildren(...answer.boxes.map(row));
  const stages = document.querySelectorAll(".stage");
  answer.boxes.forEach((box, n) => stages[box.image].append(frame(box, n)));
  if (source) stages[source.box.image].append(place(make("div", { className: "box source" }), source.box));
  if (find("answer").contains(document.activeElement) || document.activeElement === document.body) find("asked").focus();
}

const scoreOf = (box) => (box.score === null ? "" : box.score.toFixed(2));

function choosing(button, box, n) {
  button.style.setProperty("--colour", COLOURS[n % COLOURS.length]);
  button.dataset.box = n;
  if (pictures.length > 1) button.onclick = () => askSame(box, n);
  for (const [event, chosen] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
    button.addEventListener(event, () =>
      document.querySelectorAll(`[data-box="${n}"]`).forEach((other) => other.classList.toggle("chosen", chosen)),
    );
  return button;
}

function place(element, box) {
  const { width, height } = answer.images[box.image];
  element.style.left = `${(100 * box.x1) / width}%`;
  element.style.top = `${(100 * box.y1) / height}%`;
  element.style.width = `${(100 * (box.x2 - box.x1)) / width}%`;
  element.style.height = `${(100 * (box.y2 - box.y1)) / height}%`;
  element.classList.toggle("high", box.y1 < height / 12); // no room above it for its number
  element.classList.toggle("right", box.x2 > 0.8 * width);
  return element;
}

const about = (box, n) => {
  const what = `Box ${n + 1} in image ${box.image + 1}, score ${scoreOf(box) || "unknown"}`;
  return pictures.length > 1 ? `${what}: ask for the same object` : what;
};

function frame(box, n) {
  const number = make("span", { textContent: scoreOf(box) ? `${n + 1} · ${scoreOf(box)}` : `${n + 1}` });
  const button = make("button", { type: "button", className: "box", ariaLabel: about(box, n), title: about(box, n) }, number);
  return choosing(place(button, box), box, n);
}

function row(box, n) {
  const corners = [box.x1, box.y1, box.x2, box.y2].map(Math.round).join(", ");
  const label = box.label && box.label !== answer.query ? `${box.label}, ` : "";
  const small = make("small", { textContent: `${label}score ${scoreOf(box) || "unknown"}, pixels ${corners}` });
  const button = make("button", { type: "button" }, make("b", { textContent: `${n + 1}` }), `image ${box.image + 1}`, small);
  return make("li", {}, choosing(button, box, n));
}

function askSame(box, n) {
  const { width, height } = answer.images[box.image];
  const step = (value, side) => Math.min(STEPS, Math.max(0, Math.round((value / side) * STEPS)));
  const corner = (x, y) => `(${step(x, width)},${step(y, height)})`;
  const mark = `<|box_start|>${corner(box.x1, box.y1)},${corner(box.x2, box.y2)}<|box_end|>`;
  const where = `in image ${box.image + 1}`;
  ask(`the same object as ${mark} ${where}`, `the same object as box ${n + 1} ${where} (${current.shown})`, { ...current, box });
}

// What people do

find("files").onchange = (event) => {
  add(event.target.files);
  event.target.value = ""; // or the same file could not be picked again
};
find("clear").onclick = () => {
  setPictures([]);
  find("files").focus();
};
find("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(find("query").value.trim());
};
find("access").onsubmit = (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  tellModel();
};
find("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(find("json").textContent);
    find("copy").textContent = "Copied";
    say("The JSON is copied.");
  } catch {
    getSelection().selectAllChildren(find("json")); // where a page may not write to the clipboard
    find("copy").textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (find("copy").textContent = "Copy"), 2000);
};
find("sample").onclick = async () => {
  try {
    const blobs = await Promise.all(["sample-a.png", "sample-b.png"].map(async (name) => {
      const blob = await (await fetch(name)).blob();
      return new File([blob], name, { type: "image/png" });
    }));
    setPictures([]);
    add(blobs);
    find("query").value ||= "all balls";
  } catch {
    say("The service does not answer. Is it still running?", true);
  }
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
  if (scene) forget(scene);
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
    if (!find("access").hidden) {
      find("access").hidden = true;
      say("");
      find("query").focus();
    }
    most = model.limits.max_images;
    const many = model.trained_pictures ? ` It was trained on at most ${model.trained_pictures} pictures at once.` : "";
    find("about").textContent = model.shipped
      ? `The small model that ships with gemvg-edge. It knows simulated tables with toys and dishes, seen by one or two cameras, as in the sample; photographs get nonsense. It was made to show that the whole path works.${many}`
      : `The model ${model.id}.${many}`;
    find("sample").hidden = !model.shipped;
  } catch (error) {
    find("about").textContent = "";
    say(error.status === 401 && !token ? "" : error.message, true);
  }
}
tellModel();
