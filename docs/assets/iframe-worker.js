// Search in pages that are opened from disk: browsers start no Worker from file://, so its script runs in a hidden frame.
// The script posts to `self`, which is the frame's window, and may import further scripts by URL.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = this.inside = frame.contentWindow
      this.ready = new Promise(resolve => {
        inside.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => this.load(one)), Promise.resolve())
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        this.load(url).then(resolve)
      })
    }
    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.inside.document.head.appendChild(script)
      })
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
