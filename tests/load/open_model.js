// Posts a clip at a fixed rate, whether or not earlier answers have come: an open model.
//   k6 run -e URL=... -e FILE=... -e RATE=12 -e SECONDS=120 -e VUS=500 -e OUT=out.json open_model.js
import http from 'k6/http';
import { Counter, Trend } from 'k6/metrics';

const clip = open(__ENV.FILE, 'b');
const accepted = new Trend('accepted_ms', true);
const refused = new Trend('refused_ms', true);
const answered = new Counter('accepted');
const turnedAway = new Counter('refused');
const wrong = new Counter('wrong');

export const options = {
  scenarios: {
    open: {
      executor: 'constant-arrival-rate',
      rate: Math.round(Number(__ENV.RATE) * 10),
      timeUnit: '10s',
      duration: `${__ENV.SECONDS}s`,
      preAllocatedVUs: Number(__ENV.VUS),
      gracefulStop: '60s',
    },
  },
  summaryTrendStats: ['med', 'p(95)', 'p(99)', 'max'],
};

export default function () {
  const response = http.post(__ENV.URL, { file: http.file(clip, 'clip.mp4') }, { timeout: '120s' });
  // Over the request alone; k6's own waiting for a free connection is not the service's.
  const ms = response.timings.duration;
  if (response.status === 200) {
    accepted.add(ms);
    answered.add(1);
  } else if (response.status === 503 && response.headers['Retry-After']) {
    refused.add(ms);
    turnedAway.add(1);
  } else {
    wrong.add(1, { status: String(response.status) });
  }
}

export function handleSummary(data) {
  return { [__ENV.OUT]: JSON.stringify(data.metrics) };
}
