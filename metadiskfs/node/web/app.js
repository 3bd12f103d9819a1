// The page of a node: uploads, links, downloads opened in the browser. No build step, no library.
// Whatever comes from a file, a link or the node goes into the page as text, never as HTML.

const UPLOADS_AT_ONCE = 3;
const COUNTER_STARTS = [0, 1]; // the two generations of servers
const PASSPHRASE = "Something old, something new.";
const LINK = /([0-9a-f]{64})\?key=([0-9a-fA-F]{64})/;

const $ = (id) => document.getElementById(id);
const hex = (buffer) => Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");
const unhex = (text) => Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));

function sizeText(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

// --- what this browser remembers ---------------------------------------------------------------------------------

const memory = {
  read(name, otherwise) {
    try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
  },
  write(name, value) {
    try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* private windows may keep nothing */ }
  },
};

let uploads = memory.read("uploads", []);
const isUpload = (item) => item && LINK.test(`${item.filehash}?key=${item.key}`) && typeof item.name === "string";
uploads = Array.isArray(uploads) ? uploads.filter(isUpload) : [];

// --- the node ----------------------------------------------------------------------------------------------------

const WORDS = {
  "balance-insufficient": "The token's balance does not suffice.",
  "file-not-found": "The node does not have this file.",
  "file-too-large": "The file is larger than this node takes.",
  "too-many-requests": "The node is busy. Try again in a moment.",
  "insufficient-storage": "The node is full.",
  "invalid-token": "This node takes uploads from its owner only.",
};

async function problem(response) {
  const answer = await response.json().catch(() => ({}));
  return WORDS[answer.error] || `The node answered ${response.status}.`;
}

let gettingToken;
function token() {
  const kept = memory.read("token", "");
  if (/^[0-9A-Za-z]+$/.test(kept)) return Promise.resolve(kept);
  gettingToken ||= fetch("/accounts/token/new", { method: "POST" }).then(async (response) => {
    if (!response.ok) throw new Error(await problem(response));
    const fresh = (await response.json()).token;
    memory.write("token", fresh);
    return fresh;
  }).finally(() => { gettingToken = undefined; });
  return gettingToken;
}

let largest = Infinity;
async function showNode() {
  const response = await fetch("/api/status");
  if (!response.ok) throw new Error(await problem(response));
  const { storage, bandwidth } = await response.json();
  largest = storage.max_file_size || Infinity;
  $("limit").textContent = Number.isFinite(largest) ? `up to ${sizeText(largest)} each` : "";
  const room = storage.capacity ? ` of ${sizeText(storage.capacity)}` : "";
  $("summary").textContent = `Ready. ${sizeText(storage.used)} stored${room}.`;
  $("stored").textContent = sizeText(storage.used) + room;
  const total = bandwidth.total || {};
  $("moved").textContent = `${sizeText(total.incoming || 0)} / ${sizeText(total.outgoing || 0)}`;
}

async function showBalance() {
  const mine = await token();
  $("token").textContent = mine;
  const response = await fetch(`/accounts/token/balance/${mine}`);
  if (response.ok) $("balance").textContent = sizeText((await response.json()).balance);
}

const refresh = () => Promise.all([showNode(), showBalance()]).catch((error) => {
  $("summary").textContent = `The node does not answer: ${error.message}`;
});

// --- uploads -----------------------------------------------------------------------------------------------------

function say(element, text, kind = "") {
  element.textContent = text;
  element.className = `${element.classList.contains("state") ? "state " : ""}${kind}`;
}

function addEntry(name, size) {
  const entry = $("entry").content.cloneNode(true).firstElementChild;
  entry.querySelector(".name").textContent = name;
  entry.querySelector(".size").textContent = sizeText(size);
  entry.querySelector(".actions").hidden = true;
  $("uploads").prepend(entry);
  $("none").hidden = true;
  return entry;
}

function finishEntry(entry, item) {
  entry.querySelector("progress").hidden = true;
  entry.querySelector(".actions").hidden = false;
  const link = `${item.filehash}?key=${item.key}`;
  const copied = (text, what) => navigator.clipboard.writeText(text).then(
    () => say(entry.querySelector(".state"), `${what} copied.`, "good"),
    () => say(entry.querySelector(".state"), text), // no permission: show it to be copied by hand
  );
  const on = (name, act) => entry.querySelector(`.${name}`).addEventListener("click", act);
  on("copy", () => copied(`${location.origin}/#${link}`, "Link"));
  on("curl", () => copied(`${location.origin}/api/download/${link}`, "Link for curl"));
  on("fetch", () => openLink(link, item.name));
  on("forget", () => {
    uploads = uploads.filter((other) => other !== item);
    memory.write("uploads", uploads);
    entry.remove();
    $("none").hidden = uploads.length > 0 || $("uploads").children.length > 0;
  });
}

function send(file, mine, onProgress) {
  // XMLHttpRequest, because fetch does not tell how far an upload has come.
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("token", mine);
    form.append("file", file, file.name);
    const request = new XMLHttpRequest();
    request.open("POST", "/api/upload");
    request.upload.onprogress = (event) => { if (event.lengthComputable) onProgress(event.loaded / event.total); };
    request.onerror = () => reject(new Error("The connection broke."));
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* an error page of something in between */ }
      if (request.status === 201 && LINK.test(`${answer.filehash}?key=${answer.key}`)) resolve(answer);
      else reject(new Error(WORDS[answer.error] || `The node answered ${request.status}.`));
    };
    request.send(form);
  });
}

async function upload(file, entry) {
  const state = entry.querySelector(".state");
  const progress = entry.querySelector("progress");
  try {
    if (file.size > largest) throw new Error(WORDS["file-too-large"]);
    say(state, "Uploading…");
    const { filehash, key } = await send(file, await token(), (part) => { progress.value = part; });
    const item = { name: file.name, size: file.size, filehash, key, time: Date.now() };
    uploads.push(item);
    memory.write("uploads", uploads);
    say(state, "Stored.", "good");
    finishEntry(entry, item);
  } catch (error) {
    progress.hidden = true;
    say(state, error.message, "bad");
  }
}

const waiting = [];
let running = 0;
function uploadAll(files) {
  for (const file of files) waiting.push([file, addEntry(file.name, file.size)]);
  const next = async () => {
    running += 1;
    while (waiting.length) await upload(...waiting.shift());
    running -= 1;
    if (!running) refresh();
  };
  while (running < UPLOADS_AT_ONCE && running < waiting.length + running && waiting.length) next();
}

// --- downloads ---------------------------------------------------------------------------------------------------

async function decrypt(ciphertext, key, start) {
  const counter = new Uint8Array(16);
  counter[15] = start;
  const aes = await crypto.subtle.importKey("raw", key, "AES-CTR", false, ["decrypt"]);
  return crypto.subtle.decrypt({ name: "AES-CTR", counter, length: 128 }, aes, ciphertext);
}

async function keyOf(plaintext) {
  const text = (value) => new TextEncoder().encode(value);
  const digest = hex(await crypto.subtle.digest("SHA-256", plaintext));
  const mac = await crypto.subtle.importKey("raw", text(PASSPHRASE), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  return hex(await crypto.subtle.sign("HMAC", mac, text(digest)));
}

// The key follows from the content: it proves which generation's counter it was, and that nothing is amiss.
async function unseal(ciphertext, keyHex) {
  for (const start of COUNTER_STARTS) {
    const plaintext = await decrypt(ciphertext, unhex(keyHex), start);
    if (await keyOf(plaintext) === keyHex.toLowerCase()) return plaintext;
  }
  throw new Error("The key does not belong to this file.");
}

function nameIn(response, filehash) {
  const match = /filename=([\w.-]+)/.exec(response.headers.get("Content-Disposition") || "");
  return match ? match[1].replace(/^[0-9a-f]{7}_/, "") : filehash.slice(0, 7);
}

async function fetchObject(filehash, state) {
  const mine = memory.read("token", "");
  const response = await fetch(`/api/download/${filehash}${mine ? `?token=${encodeURIComponent(mine)}` : ""}`);
  if (!response.ok) throw new Error(await problem(response));
  const total = Number(response.headers.get("Content-Length"));
  const pieces = [];
  let got = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    got += value.length;
    if (total) say(state, `Fetching… ${Math.floor((100 * got) / total)} %`);
  }
  const ciphertext = await new Blob(pieces).arrayBuffer();
  if (hex(await crypto.subtle.digest("SHA-256", ciphertext)) !== filehash) {
    throw new Error("What the node sent is not this file.");
  }
  return [ciphertext, nameIn(response, filehash)];
}

let blobUrl = "";
async function openLink(text, name = "") {
  const state = $("opened");
  const match = LINK.exec(text);
  try {
    if (!match) throw new Error("Not a link: it has the form filehash?key=…, 64 hexadecimal digits each.");
    if (!globalThis.crypto?.subtle) throw new Error("Browsers decrypt only on https pages and on localhost.");
    const [, filehash, key] = match;
    $("link").value = `${filehash}?key=${key}`;
    say(state, "Fetching…");
    const [ciphertext, shown] = await fetchObject(filehash, state);
    say(state, "Checking…");
    const plaintext = await unseal(ciphertext, key);
    URL.revokeObjectURL(blobUrl);
    blobUrl = URL.createObjectURL(new Blob([plaintext], { type: "application/octet-stream" }));
    const anchor = document.createElement("a");
    anchor.href = blobUrl;
    anchor.download = name || shown;
    anchor.textContent = anchor.download;
    say(state, "Proven and decrypted, saved as ", "good");
    state.append(anchor, ` (${sizeText(plaintext.byteLength)}).`);
    anchor.click();
  } catch (error) {
    say(state, error.message, "bad");
  }
}

// --- wiring ------------------------------------------------------------------------------------------------------

$("files").addEventListener("change", (event) => {
  uploadAll(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
}
document.addEventListener("drop", (event) => uploadAll(event.dataTransfer.files));
$("open").addEventListener("submit", (event) => { event.preventDefault(); openLink($("link").value.trim()); });
$("copy-token").addEventListener("click", () => navigator.clipboard.writeText($("token").textContent).catch(() => {}));
$("redeem").addEventListener("submit", async (event) => {
  event.preventDefault();
  const response = await fetch(`/accounts/token/redeem/${await token()}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ promocode: $("code").value.trim() }),
  }).catch(() => ({ ok: false }));
  say($("redeemed"), response.ok ? "Added." : "This code is unknown or used.", response.ok ? "good" : "bad");
  refresh();
});
const openFromAddress = () => { if (location.hash.length > 1) openLink(decodeURIComponent(location.hash.slice(1))); };
addEventListener("hashchange", openFromAddress);

for (const item of uploads) finishEntry(addEntry(item.name, item.size), item);
refresh();
openFromAddress();
