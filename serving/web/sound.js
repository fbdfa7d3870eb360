// The city from afar: a slow chord and a breath of wind, made here; nothing is downloaded.

const CHORD_HZ = [110, 164.8, 220, 277.2];
const LOUDNESS = 0.05;
const FADE_S = 2;

export class Sound {
  get on() {
    return Boolean(this.context);
  }

  toggle() {
    if (this.context) this.stop();
    else this.start();
  }

  start() {
    this.context = new AudioContext();
    const { context } = this;
    this.volume = new GainNode(context, { gain: 0 });
    this.volume.connect(context.destination);
    this.volume.gain.linearRampToValueAtTime(LOUDNESS, context.currentTime + FADE_S);
    CHORD_HZ.forEach((frequency, number) => this.voice(frequency, number));
    this.wind();
  }

  stop() {
    const { context, volume } = this;
    this.context = null;
    volume.gain.cancelScheduledValues(context.currentTime);
    volume.gain.setValueAtTime(volume.gain.value, context.currentTime); // from where the rise had come, without a click
    volume.gain.setTargetAtTime(0, context.currentTime, FADE_S / 4);
    setTimeout(() => context.close(), 1000 * FADE_S);
  }

  // A tone that swells and fades in a rhythm of its own.
  voice(frequency, number) {
    const { context } = this;
    const tone = new OscillatorNode(context, { type: "triangle", frequency, detune: 3 * number });
    const swell = new GainNode(context, { gain: 0.5 });
    const slow = new OscillatorNode(context, { frequency: 0.05 + 0.017 * number });
    const depth = new GainNode(context, { gain: 0.4 });
    slow.connect(depth).connect(swell.gain);
    tone.connect(swell).connect(this.volume);
    tone.start();
    slow.start();
  }

  wind() {
    const { context } = this;
    const noise = context.createBuffer(1, 4 * context.sampleRate, context.sampleRate);
    const samples = noise.getChannelData(0);
    for (let at = 0; at < samples.length; at++) samples[at] = 2 * Math.random() - 1;
    const source = new AudioBufferSourceNode(context, { buffer: noise, loop: true });
    const low = new BiquadFilterNode(context, { type: "lowpass", frequency: 400 });
    source.connect(low).connect(new GainNode(context, { gain: 0.6 })).connect(this.volume);
    source.start();
  }
}
