// Where an answer came from and what it cost: in one line, and with every figure behind it.
//
// A turn's origin is what the answer's headers said (see server.js), its figures what the stream ended with.

// "Told by the model · 48 tokens/s · 7.2 J"
export function headline({ origin, figures, stopped }) {
  const parts = [origin.source === "model" ? "Told by the model" : readyHeadline(origin)];
  if (figures?.timings.tokens_per_second) parts.push(`${Math.round(figures.timings.tokens_per_second)} tokens/s`);
  if (figures) parts.push(`${short(figures.usage.energy.joules)} J`);
  if (figures?.finish === "length") parts.push("cut at the longest reply");
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

// Pairs of a term and what there is to say of it.
export function facts({ origin, figures }) {
  const told = origin.source === "model" ? modelFacts(origin) : readyFacts(origin);
  return figures ? [...told, ...costs(figures)] : told;
}

function readyHeadline({ bound }) {
  if (!bound) return "Ready answer to these very words";
  return `Ready answer, certified: at most ${percent(bound)} of such answers are wrong`;
}

function readyFacts({ entry, certificate, bound }) {
  if (!certificate) return [["Entry", entry], ["Found by", "its exact words, which need no certificate"]];
  return [
    ["Entry", entry],
    ["Found by", "likeness to what others asked"],
    ["Certificate", certificate],
    ["Certified", `at most ${percent(bound)} of answers found by likeness are wrong`],
  ];
}

function modelFacts({ miss, dropped }) {
  const told = [["No ready answer", miss]];
  if (dropped) told.push(["Forgotten", `the first ${dropped} turns, which no longer fit`]);
  return told;
}

function costs({ usage, timings }) {
  const { cpu_seconds, joules, joules_low, joules_high, grams_co2e, source } = usage.energy;
  const told = [];
  if (usage.completion_tokens) {
    told.push(["Prompt", `${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details.cached_tokens} already computed`]);
    told.push(["Reply", `${usage.completion_tokens} tokens`]);
  }
  if (timings.tokens_per_second) told.push(["Speed", `${timings.tokens_per_second.toFixed(1)} tokens/s`]);
  const range = source === "modelled" ? `modelled, between ${short(joules_low)} and ${short(joules_high)}` : "metered";
  told.push(
    ["First word", `after ${short(timings.ttft_ms)} ms`],
    ["Processor", `${short(cpu_seconds)} s of one core`],
    ["Energy", `${short(joules)} J (${range})`],
    ["CO₂e", `${short(1000 * grams_co2e)} mg`],
  );
  return told;
}

function percent(share) {
  return `${(100 * Number(share)).toFixed(1)} %`;
}

function short(number) {
  return String(Number(number.toPrecision(2)));
}
