// The voice-chat page: microphone → server → transcript, sound, latency and spectrogram.
import { Mel, drawMel } from "./mel.js";
import { Connection } from "./realtime.js";
import { Microphone, Player, RATE_HZ, fromBase64, join, toBase64, wavFile } from "./sound.js";

const STAGES = {
  encoder: "#4e79a7", adapter: "#76b7b2", prefill: "#59a14f", text: "#edc948", speech: "#f28e2b", flow: "#e15759",
  vocoder: "#b07aa1",
};
const SHORTEST_HOLD_MS = 250;
const MICROPHONE_IDLE_MS = 30000; // then the browser's recording sign goes out
const BARS = 5;
const HANDS_FREE = { type: "server_vad", interrupt_response: true, create_response: true };
const LATE_CANCEL = "response_cancel_not_active"; // the answer ended by itself meanwhile

const byId = (id) => document.getElementById(id);
const ms = (value) => `${Math.round(value)} ms`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// One answer: its text, sound and measurements, and the place where they are shown.
class Answer {
  constructor(number, responseId) {
    this.number = number;
    this.responseId = responseId;
    this.text = element("span");
    this.foot = element("div", { className: "vn-foot" });
    this.view = element("li", { className: "vn-answer" }, this.text, this.foot);
    this.chunks = [];
    this.mel = new Mel();
    this.loudest = 0; // RMS of 50 ms of what was played
    this.gapsMs = [];
    this.stopped = false;
  }

  get seconds() {
    return this.chunks.reduce((sum, chunk) => sum + chunk.length, 0) / RATE_HZ;
  }

  // The sound is complete, or will not go on: offer it.
  offer() {
    if (!this.chunks.length || this.link) return;
    const href = URL.createObjectURL(wavFile(join(this.chunks)));
    const textContent = `Download WAV (${this.seconds.toFixed(1)} s)`;
    this.link = element("a", { href, textContent, download: `vocalnet-answer-${this.number}.wav` });
    this.foot.append(this.link);
  }

  // After an interruption: what the model remembers, and what it forgot because nobody heard it.
  showHeard(transcript) {
    const whole = this.text.textContent;
    const rest = whole.startsWith(transcript) ? whole.slice(transcript.length) : "";
    const title = "Not heard: the model has forgotten it.";
    this.text.replaceChildren(transcript);
    if (rest) this.text.append(element("s", { className: "vn-unheard", textContent: rest, title }));
  }

  note(text) {
    this.foot.append(element("span", { textContent: text }));
  }
}

class Page {
  constructor(options) {
    this.settings = options; // {mtp, decoding}
    this.answers = [];
    this.byItem = new Map(); // item id → Answer
    this.heard = new Map(); // item id → where the user's words are shown
    this.turnDetection = null;
    this.sending = false; // microphone blocks go to the server
    this.holding = false;
    this.responding = false; // the server is making an answer
    this.player = new Player();
    this.microphone = new Microphone((block) => this.onBlock(block));
    this.invitation = byId("vn-empty");
    this.listenToPlayer();
    this.bind();
    this.showLegend({});
  }

  // ---- controls ----

  bind() {
    const hold = byId("vn-hold");
    hold.addEventListener("pointerdown", (event) => {
      hold.setPointerCapture(event.pointerId);
      this.holdStart();
    });
    for (const name of ["pointerup", "pointercancel", "blur"]) hold.addEventListener(name, () => this.holdEnd());
    hold.addEventListener("contextmenu", (event) => event.preventDefault()); // a long press on a phone
    const isTalkKey = ({ key }) => key === " " || key === "Enter";
    hold.addEventListener("keydown", (event) => {
      if (!isTalkKey(event)) return;
      event.preventDefault();
      if (!event.repeat) this.holdStart();
    });
    hold.addEventListener("keyup", (event) => isTalkKey(event) && this.holdEnd());
    byId("vn-free").addEventListener("click", () => this.setHandsFree(this.turnDetection === null));
    byId("vn-stop").addEventListener("click", () => this.interrupt());
    document.addEventListener("keydown", ({ key }) => key === "Escape" && this.interrupt());
  }

  // Everything that the user starts goes through here, so that every failure ends as one line on the page.
  async attempt(action) {
    try {
      this.showAlert("");
      await this.connect();
      await this.player.open();
      await action();
    } catch (error) {
      this.showAlert(error.message);
      this.stopListening();
    }
  }

  async holdStart() {
    if (this.holding) return;
    this.holding = true;
    byId("vn-hold").classList.add("vn-active");
    await this.attempt(async () => {
      await this.openMicrophone();
      if (!this.holding) return; // released while the browser asked for permission
      if (this.turnDetection) this.setTurnDetection(null);
      await this.interrupt();
      this.connection.send("input_audio_buffer.clear");
      this.sentMs = 0;
      this.sending = true;
      this.showStatus("listening");
    });
  }

  holdEnd() {
    if (!this.holding) return;
    this.holding = false;
    byId("vn-hold").classList.remove("vn-active");
    this.releaseMicrophoneLater();
    if (!this.sending) return;
    this.sending = false;
    if (this.sentMs < SHORTEST_HOLD_MS) {
      this.connection.send("input_audio_buffer.clear");
      this.showStatus("ready");
      this.showAlert("Hold the button while you speak, and release it when you are done.");
      return;
    }
    this.connection.send("input_audio_buffer.commit");
    this.ask();
  }

  setHandsFree(on) {
    if (!on) {
      this.connection?.send("input_audio_buffer.clear");
      this.stopListening();
      return undefined;
    }
    return this.attempt(async () => {
      await this.openMicrophone();
      this.setTurnDetection(HANDS_FREE);
      this.sending = true;
      this.showStatus("listening");
    });
  }

  sendText(text) {
    if (!text.trim()) return undefined;
    return this.attempt(async () => {
      await this.interrupt();
      const content = [{ type: "input_text", text: text.trim() }];
      this.connection.send("conversation.item.create", { item: { type: "message", role: "user", content } });
      this.ask();
    });
  }

  ask() {
    this.turnEnded = performance.now();
    this.connection.send("response.create");
    this.showStatus("thinking");
  }

  // Ends the answer that is being made or heard; the server forgets what was not heard.
  async interrupt() {
    if (this.responding) this.connection.send("response.cancel");
    await this.stopSound();
  }

  async stopSound() {
    const unheard = this.answers.filter((answer) => !answer.finished && !answer.stopped);
    unheard.forEach((answer) => (answer.stopped = true));
    const { id, played } = await this.player.flush();
    for (const answer of unheard) {
      const heardMs = answer.itemId === id ? Math.floor((1000 * played) / RATE_HZ) : 0;
      if (!answer.itemId || !answer.chunks.length) continue;
      const fields = { item_id: answer.itemId, content_index: 0, audio_end_ms: heardMs };
      this.connection?.send("conversation.item.truncate", fields);
      answer.note(`stopped after ${(heardMs / 1000).toFixed(1)} s`);
      answer.offer();
      this.showNumbers(answer);
      this.scrollDown();
    }
    this.showIdle();
  }

  set(changes) {
    Object.assign(this.settings, changes);
    this.connection?.send("session.update", { session: { type: "realtime", vocalnet: { ...this.settings } } });
  }

  async restart() {
    await this.stopSound();
    this.stopListening();
    this.connection?.close();
    this.responding = false;
    this.answers = [];
    this.byItem.clear();
    this.heard.clear();
    byId("vn-turns").replaceChildren(this.invitation);
    byId("vn-latency").replaceChildren();
    this.showLegend({});
    byId("vn-numbers").textContent = "No answer yet.";
    drawMel(byId("vn-mel"), new Mel());
    this.showAlert("");
    this.showStatus("ready");
  }

  // ---- microphone ----

  async openMicrophone() {
    clearTimeout(this.microphoneTimer);
    await this.microphone.open();
  }

  releaseMicrophoneLater() {
    clearTimeout(this.microphoneTimer);
    this.microphoneTimer = setTimeout(() => {
      if (!this.sending && !this.holding) this.microphone.close();
    }, MICROPHONE_IDLE_MS);
  }

  stopListening() {
    this.sending = false;
    this.holding = false;
    byId("vn-hold").classList.remove("vn-active");
    if (this.turnDetection) this.setTurnDetection(null);
    this.releaseMicrophoneLater();
    this.showStatus("ready");
  }

  onBlock({ samples, level }) {
    const loudness = this.sending ? Math.min(1, 6 * level) : 0;
    byId("vn-level").style.setProperty("--vn-loudness", loudness.toFixed(2));
    if (!this.sending) return;
    this.sentMs += (1000 * samples.length) / RATE_HZ;
    this.connection.send("input_audio_buffer.append", { audio: toBase64(samples) });
  }

  // ---- server ----

  async connect() {
    if (this.connection?.isOpen) return;
    this.showStatus("connecting");
    const key = new URLSearchParams(location.hash.slice(1)).get("key");
    const url = new URL("/v1/realtime", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    url.hash = "";
    const connection = (this.connection = new Connection(url.href, key));
    this.listenToServer(connection);
    await connection.open();
    const format = { type: "audio/pcm", rate: RATE_HZ };
    const input = { format, transcription: {}, turn_detection: this.turnDetection };
    const session = { type: "realtime", audio: { input, output: { format } } };
    connection.send("session.update", { session: { ...session, vocalnet: { ...this.settings, events: true } } });
    this.showStatus("ready");
  }

  setTurnDetection(turnDetection) {
    this.turnDetection = turnDetection;
    byId("vn-free").setAttribute("aria-pressed", String(turnDetection !== null));
    const session = { type: "realtime", audio: { input: { turn_detection: turnDetection } } };
    this.connection?.send("session.update", { session });
  }

  listenToServer(connection) {
    const on = (type, handle) => connection.addEventListener(type, ({ detail }) => handle(detail));
    on("conversation.item.added", ({ item }) => item.role === "user" && this.showQuestion(item));
    on("conversation.item.input_audio_transcription.delta", ({ item_id, delta }) => this.showHeard(item_id, delta));
    on("conversation.item.input_audio_transcription.completed", ({ item_id, transcript }) => {
      this.showHeard(item_id, transcript || "(no words recognised)", true);
      if (!transcript && !this.responding) this.showIdle();
    });
    on("conversation.item.input_audio_transcription.failed", ({ item_id }) => {
      this.showHeard(item_id, "(spoken)", true);
    });
    on("input_audio_buffer.speech_started", () => this.onSpeechStarted());
    on("input_audio_buffer.speech_stopped", () => {
      this.turnEnded = performance.now();
      this.showStatus("thinking");
    });
    on("response.created", ({ response }) => this.onResponse(response));
    on("response.output_item.added", ({ response_id, item }) => this.onAnswerItem(response_id, item));
    on("response.output_audio_transcript.delta", ({ item_id, delta }) => this.showText(item_id, delta));
    on("response.output_text.delta", ({ item_id, delta }) => this.showText(item_id, delta));
    on("response.output_audio.delta", ({ item_id, delta }) => this.onSound(item_id, fromBase64(delta)));
    on("response.output_audio.done", ({ item_id }) => this.onSoundDone(item_id));
    on("conversation.item.truncated", ({ item_id }) => connection.send("conversation.item.retrieve", { item_id }));
    on("conversation.item.retrieved", ({ item }) => {
      this.byItem.get(item.id)?.showHeard(item.content[0]?.transcript ?? "");
    });
    on("vocalnet.response.latency", (event) => this.onLatency(event));
    on("response.done", ({ response }) => this.onResponseDone(response));
    on("error", ({ error }) => error.code !== LATE_CANCEL && this.showAlert(error.message));
    on("closed", (line) => this.onClosed(line));
  }

  onSpeechStarted() {
    this.stopSound();
    this.showStatus("listening");
  }

  onResponse(response) {
    this.responding = true;
    const answer = new Answer(this.answers.length + 1, response.id);
    answer.turnEnded = this.turnEnded;
    this.answers.push(answer);
    this.showStatus("thinking");
  }

  onAnswerItem(responseId, item) {
    const answer = this.answers.find((each) => each.responseId === responseId);
    if (!answer) return;
    answer.itemId = item.id;
    this.byItem.set(item.id, answer);
    this.addTurn(answer.view);
  }

  showText(itemId, delta) {
    const answer = this.byItem.get(itemId);
    if (!answer || answer.stopped) return;
    answer.text.textContent += delta;
    this.scrollDown();
  }

  onSound(itemId, samples) {
    const answer = this.byItem.get(itemId);
    if (!answer || answer.stopped) return;
    this.player.push(itemId, samples);
    answer.chunks.push(samples);
    this.showMel(answer, false);
  }

  onSoundDone(itemId) {
    const answer = this.byItem.get(itemId);
    if (!answer || answer.stopped) return;
    this.player.end(itemId);
    this.showMel(answer, true);
    answer.offer();
  }

  onResponseDone(response) {
    this.responding = false;
    const answer = this.answers.find((each) => each.responseId === response.id);
    if (answer && !answer.chunks.length) answer.finished = true; // nothing to hear
    if (response.status === "failed") {
      this.showAlert(response.status_details?.error?.message || "The server could not answer. Ask again.");
    }
    if (!answer || answer.finished) this.showIdle();
  }

  onClosed(line) {
    this.responding = false;
    this.stopListening();
    this.showAlert(line);
  }

  // ---- sound ----

  listenToPlayer() {
    const on = (type, handle) => {
      this.player.addEventListener(type, ({ detail }) => {
        const answer = this.byItem.get(detail.id);
        if (answer) handle(answer, detail);
      });
    };
    on("start", (answer) => {
      answer.soundAfterMs = performance.now() - answer.turnEnded;
      this.showStatus("speaking");
      this.showLatency(answer);
    });
    on("progress", (answer, { rms, buffered }) => {
      answer.loudest = Math.max(answer.loudest, rms);
      answer.bufferedMs = (1000 * buffered) / RATE_HZ;
    });
    on("end", (answer, { gaps, played }) => {
      answer.finished = true;
      answer.playedMs = (1000 * played) / RATE_HZ;
      answer.gapsMs = gaps.map((gap) => (1000 * gap) / RATE_HZ);
      this.showNumbers(answer);
      if (!this.responding) this.showIdle();
    });
  }

  // ---- what is shown ----

  addTurn(view) {
    this.invitation.remove();
    byId("vn-turns").append(view);
    this.scrollDown();
  }

  scrollDown() {
    const turns = byId("vn-turns");
    turns.scrollTop = turns.scrollHeight;
  }

  showQuestion(item) {
    const typed = item.content?.find((part) => part.type === "input_text");
    const view = element("li", { className: "vn-user", textContent: typed ? typed.text : "…" });
    view.classList.toggle("vn-pending", !typed);
    if (!typed) this.heard.set(item.id, { view, text: "" });
    this.addTurn(view);
  }

  showHeard(itemId, text, complete = false) {
    const heard = this.heard.get(itemId);
    if (!heard) return;
    heard.text = complete ? text : heard.text + text;
    heard.view.textContent = heard.text;
    heard.view.classList.toggle("vn-pending", !complete);
    this.scrollDown();
  }

  onLatency(event) {
    const answer = this.answers.find((each) => each.responseId === event.response_id);
    if (!answer) return;
    answer[event.final ? "total" : "first"] = event;
    this.showLatency(answer);
    this.showNumbers(answer);
  }

  showLatency(answer) {
    if (!answer.first) return;
    if (!answer.bar) {
      const list = byId("vn-latency");
      list.querySelector(".vn-empty")?.remove();
      answer.bar = element("li");
      list.prepend(answer.bar);
      while (list.children.length > BARS) list.lastChild.remove();
    }
    const { first } = answer;
    const stages = Object.entries(first.stages_ms).filter(([, value]) => value > 0);
    const widest = Math.max(...this.answers.slice(-BARS).map(workMs));
    const bar = element("div", { className: "vn-bar" }, ...stages.map(([name, value]) => {
      const part = element("i", { title: `${name} ${ms(value)}` });
      part.style.setProperty("--vn-stage", STAGES[name] || "#8a8f98");
      part.style.width = `${(100 * value) / widest}%`;
      return part;
    }));
    const parts = [`server ${ms(first.first_audio_ms)}`];
    if (answer.soundAfterMs !== undefined) parts.unshift(`sound after ${ms(answer.soundAfterMs)}`);
    if (first.vad_wait_ms) parts.push(`after a pause of ${ms(first.vad_wait_ms)}`);
    const label = `${answer.number}: ${parts.join(", ")}`;
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", stages.map(([name, value]) => `${name} ${ms(value)}`).join(", "));
    this.showLegend(first.stages_ms);
    answer.bar.replaceChildren(element("div", { textContent: label }), bar);
  }

  showLegend(stagesMs) {
    byId("vn-legend").replaceChildren(...Object.entries(STAGES).map(([name, colour]) => {
      const item = element("li", { textContent: name in stagesMs ? `${name} ${ms(stagesMs[name])}` : name });
      item.style.setProperty("--vn-stage", colour);
      return item;
    }));
  }

  showNumbers(answer) {
    const parts = [`Answer ${answer.number}: ${answer.seconds.toFixed(1)} s`];
    if (answer.total) parts.push(`real-time factor ${answer.total.rtf}`, `${answer.total.tokens_per_step} tokens a step`);
    if (answer.finished) parts.push(`gaps: ${answer.gapsMs.length ? answer.gapsMs.map(ms).join(", ") : "none"}`);
    byId("vn-numbers").textContent = parts.join(" · ");
  }

  showMel(answer, complete) {
    answer.mel.update(join(answer.chunks), complete);
    drawMel(byId("vn-mel"), answer.mel);
    byId("vn-seconds").textContent = `${Math.max(4, answer.seconds).toFixed(1)} s`;
  }

  showIdle() {
    this.showStatus(this.turnDetection ? "listening" : "ready");
  }

  showStatus(state) {
    const words = { ready: "Ready", connecting: "Connecting …", listening: "Listening …", thinking: "Thinking …",
      speaking: "Speaking" };
    const view = byId("vn-status");
    view.dataset.state = state;
    view.textContent = words[state];
    byId("vn-stop").disabled = !["thinking", "speaking"].includes(state);
  }

  showAlert(line) {
    const view = byId("vn-alert");
    view.textContent = line;
    view.hidden = !line;
  }
}

function workMs(answer) {
  return Object.values(answer.first?.stages_ms || {}).reduce((sum, value) => sum + value, 0);
}

// Gradio builds the page after this script is loaded.
function start() {
  const place = byId("vn-latency") && byId("vn-hold") && document.querySelector("[data-vn-settings]");
  if (!place) return false;
  window.vocalnet = new Page(JSON.parse(place.dataset.vnSettings));
  return true;
}

if (!start()) {
  const observer = new MutationObserver(() => start() && observer.disconnect());
  observer.observe(document.documentElement, { childList: true, subtree: true });
}
