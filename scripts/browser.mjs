// Show a page in Chromium over its DevTools protocol: the value of an expression in it and, if asked, a picture.
//
//     node browser.mjs '{"binary": ..., "url": ..., "width": 390, "height": 1200, "dark": false, "picture": null}'
//
// The expression comes on standard input, its value goes to standard output as JSON.
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { binary, url, width, height, dark, picture } = JSON.parse(process.argv[2]);
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const flags = ["--headless=shell", "--no-sandbox", "--no-zygote", "--disable-gpu", "--in-process-gpu", "--no-first-run"];
flags.push("--hide-scrollbars", "--disable-background-networking", "--remote-debugging-port=0", "about:blank");
const browser = spawn(binary, [`--user-data-dir=${profile}`, ...flags], { stdio: ["ignore", "ignore", "pipe"] });

const address = await new Promise((resolve, reject) => {
  let said = "";
  browser.on("error", reject);
  browser.on("exit", (code) => reject(new Error(`${binary} ended with ${code}: ${said.slice(-500)}`)));
  browser.stderr.on("data", (data) => {
    said += data;
    const found = said.match(/ws:\/\/\S+/);
    if (found) resolve(found[0]);
  });
});
browser.removeAllListeners("exit");
const socket = new WebSocket(address);
await new Promise((resolve) => (socket.onopen = resolve));
const answers = new Map();
let loaded = null;
let session = undefined;
const load = new Promise((resolve) => (loaded = resolve));
socket.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  if (message.method === "Page.loadEventFired") loaded();
  answers.get(message.id)?.(message);
};
function send(method, params = {}) {
  const id = answers.size + 1;
  socket.send(JSON.stringify({ id, method, params, sessionId: session }));
  return new Promise((resolve, reject) =>
    answers.set(id, ({ error, result }) => (error ? reject(new Error(error.message)) : resolve(result))),
  );
}
const { targetId } = await send("Target.createTarget", { url: "about:blank" });
session = (await send("Target.attachToTarget", { targetId, flatten: true })).sessionId;
const features = [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }];
await send("Emulation.setEmulatedMedia", { features });
await send("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
await send("Page.enable");
await send("Page.navigate", { url });
await load;
const expression = readFileSync(0, "utf-8");
const { result, exceptionDetails } = await send("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
if (picture) writeFileSync(picture, Buffer.from((await send("Page.captureScreenshot")).data, "base64"));
await new Promise((resolve) => {
  browser.on("exit", resolve);
  browser.kill("SIGKILL");
});
rmSync(profile, { recursive: true, force: true, maxRetries: 3 });
if (exceptionDetails) console.error(exceptionDetails.exception?.description ?? exceptionDetails.text);
else console.log(JSON.stringify(result.value ?? null));
process.exit(exceptionDetails ? 1 : 0);
