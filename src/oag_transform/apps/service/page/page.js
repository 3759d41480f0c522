"use strict";

const at = (id) => document.getElementById(id);
const percent = (share) => (share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`);

let picture = null; // a Blob to send
let limit = Infinity;
let frames = [];

function say(text) {
  at("status").textContent = text;
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function choose(blob, name, button) {
  for (const other of document.querySelectorAll("#samples button")) {
    other.setAttribute("aria-pressed", String(other === button));
  }
  at("file-name").textContent = button ? "Drop a picture here, or choose a file" : name;
  complain("");
  picture = null;
  if (blob.size > limit) {
    complain(`${name} has ${(blob.size / 2 ** 20).toFixed(1)} MiB; at most ${limit / 2 ** 20} MiB are accepted.`);
  } else {
    picture = blob;
    say(`${name} is chosen.`);
  }
  at("go").disabled = !picture;
}

function showGuesses(list, guesses) {
  list.replaceChildren(
    ...guesses.map((guess) => {
      const row = document.createElement("li");
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.width = `${100 * guess.probability}%`;
      const [name, share] = [guess.name, percent(guess.probability)].map((text) => {
        const span = document.createElement("span");
        span.className = "text";
        span.textContent = text;
        return span;
      });
      row.append(bar, name, " ", share);
      return row;
    }),
  );
}

function showFrame() {
  const frame = frames[Number(at("step").value)];
  const last = frames[frames.length - 1];
  const where = `${frame.step} of ${last.step}`;
  const seen = `${frame.guess.name}, ${percent(frame.guess.probability)}`;
  at("frame").src = frame.image;
  at("frame").alt = `The picture after network step ${where}`;
  at("step-value").textContent = where;
  at("step").setAttribute("aria-valuetext", `${where}: ${seen}`);
  at("frame-note").textContent =
    `Prediction: ${seen}. It differs from the attacked picture by ${frame.residual.toFixed(1)} grey levels (root mean square).`;
}

function show(found, method, eps) {
  for (const part of ["original", "attacked", "purified"]) {
    at(part).querySelector("img").src = found[part].image;
    showGuesses(at(part).querySelector("ol"), found[part].guesses);
  }
  for (const part of ["attacked", "purified"]) {
    at(`${part}-difference`).src = found[part].difference;
    at(`${part}-difference`).alt = `Difference of the ${part} picture from the original, magnified`;
  }
  frames = found.frames;
  at("step").max = String(frames.length - 1);
  at("step").value = at("step").max;
  showFrame();
  const [before, under, after] = ["original", "attacked", "purified"].map((part) => found[part].guesses[0]);
  const fooled = under.label !== before.label;
  const verdict = !fooled
    ? "the attack did not change the prediction; try a larger bound."
    : after.label === before.label
      ? `purified: ${after.name} again.`
      : `purified: ${after.name}, a different class.`;
  at("verdict").textContent = `${before.name} before, ${under.name} under ${method} within ${eps} grey levels; ${verdict}`;
  at("results").hidden = false;
}

async function attack(event) {
  event.preventDefault();
  if (!picture || at("go").getAttribute("aria-disabled") === "true") return;
  const [method, eps] = [at("method"), at("eps").value];
  const name = method.selectedOptions[0].text;
  complain("");
  say("Attacking and purifying; this takes some seconds.");
  at("go").setAttribute("aria-disabled", "true"); // not disabled, which would lose the keyboard's place
  at("results").setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(`/attack?method=${method.value}&eps=${eps}`, {
      method: "POST",
      headers: { "Content-Type": picture.type || "application/octet-stream" },
      body: picture,
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    show(found, name, eps);
    say("Done; the results are below.");
    at("results-title").focus({ preventScroll: true });
    at("results").scrollIntoView({ block: "start" });
  } catch (error) {
    say("");
    complain(error instanceof TypeError ? "The server doesn't answer." : error.message);
  } finally {
    at("go").removeAttribute("aria-disabled");
    at("results").removeAttribute("aria-busy");
  }
}

function sample(entry) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  image.src = `/samples/${entry.file}`;
  image.alt = entry.alt;
  image.width = image.height = 88;
  button.append(image, entry.name);
  button.addEventListener("click", async () => {
    try {
      const answer = await fetch(image.src);
      choose(await answer.blob(), entry.name, button);
    } catch {
      complain("The server doesn't answer.");
    }
  });
  return button;
}

async function begin() {
  const about = await (await fetch("/about")).json();
  limit = about.body;
  at("model").textContent = `Here it is ${about.model}, ${about.classes} classes, ${about.side} x ${about.side} pixels.`;
  at("eps").max = String(about.largest_eps);
  at("samples").append(...about.samples.map(sample));
  at("credits").textContent = about.samples.map((entry) => `${entry.name}, ${entry.credit}`).join("; ");
  document.querySelector(".magnified").textContent = `times ${about.magnified}`;
}

at("form").addEventListener("submit", attack);
at("step").addEventListener("input", showFrame);
at("eps").addEventListener("input", () => {
  at("eps-value").textContent = at("eps").value;
  at("eps").setAttribute("aria-valuetext", `${at("eps").value} of 255 grey levels`);
});
at("file").addEventListener("change", () => {
  const file = at("file").files[0];
  if (file) choose(file, file.name, null);
  at("file").value = ""; // the same file may be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault(); // anywhere: a browser would open the file in place of the page
  at("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) choose(file, file.name, null);
});
begin().catch(() => complain("The server doesn't answer."));
