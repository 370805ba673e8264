// Streams and events. Lazy streams (the default) run nothing until somebody waits, so that a missing wait shows.
#include <chrono>

#include "state.h"

using namespace stub;

namespace {

constexpr u64 kLegacyStream = 1, kPerThreadStream = 2;  // CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
constexpr unsigned kPollsPerOp = 4;                     // lazy streams progress when polled, slowly

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Result run_next(Stream *stream) {
  Op op = std::move(stream->queue.front());
  stream->queue.pop_front();
  Result failed = op.run();
  stream->num_done++;
  if (failed && is_sticky(failed)) driver().lost = failed;
  return failed;
}

Result capture_into(Stream *stream, Op op) {
  if (stream->status != kCapturing) return STREAM_CAPTURE_INVALIDATED;
  auto node = std::make_unique<Node>(Node{std::move(op), stream->tail});
  stream->capture->nodes.push_back(std::move(node));
  stream->tail = {static_cast<int>(stream->capture->nodes.size()) - 1};
  return SUCCESS;
}

}  // namespace

namespace stub {

Stream *stream_of(void *handle) {
  u64 value = reinterpret_cast<u64>(handle);
  if (value == 0 || value == kLegacyStream || value == kPerThreadStream) return &driver().null_stream;
  auto *stream = static_cast<Stream *>(handle);
  return driver().streams.count(stream) ? stream : nullptr;
}

bool is_capturing() {
  for (auto *s : driver().streams)
    if (s->capture && s->capture_mode != kRelaxedCapture) return true;
  return false;
}

Result invalidate_captures() {
  for (auto *s : driver().streams)
    if (s->capture) s->status = kInvalidated;
  return STREAM_CAPTURE_UNSUPPORTED;
}

Result run_until(Stream *stream, u64 position) {
  if (stream != &driver().null_stream && !driver().streams.count(stream)) return driver().lost;  // destroyed: all done
  while (!stream->queue.empty() && stream->num_done < position)
    if (Result failed = run_next(stream)) return failed;
  return driver().lost;
}

Result run_all(Stream *stream) { return run_until(stream, ~u64{0}); }

Result run_everything() {
  for (auto *s : driver().streams)
    if (Result failed = run_all(s)) return failed;
  return run_all(&driver().null_stream);
}

Result issue(void *handle, Op op) {
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return capture_into(stream, std::move(op));
  bool is_null = stream == &driver().null_stream;
  if (is_null) {
    if (is_capturing()) return STREAM_CAPTURE_IMPLICIT;
    for (auto *s : driver().streams)
      if (s->blocking)
        if (Result failed = run_all(s)) return failed;
  }
  stream->queue.push_back(std::move(op));
  stream->num_issued++;
  return driver().settings.lazy && !is_null ? SUCCESS : run_all(stream);
}

}  // namespace stub

ENTRY cuStreamCreateWithPriority(void **handle, unsigned flags, int) {
  GATE(kContext);
  auto *stream = new Stream;
  stream->device = current();
  stream->blocking = !(flags & kNonBlocking);
  driver().streams.insert(stream);
  *handle = stream;
  return SUCCESS;
}

ENTRY cuStreamCreate(void **handle, unsigned flags) {
  GATE(kContext);
  return cuStreamCreateWithPriority(handle, flags, 0);
}

ENTRY cuStreamDestroy(void *handle) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  if (!stream || stream == &driver().null_stream) return INVALID_HANDLE;
  Result failed = run_all(stream);
  driver().streams.erase(stream);
  delete stream;
  return failed;
}

ENTRY cuStreamSynchronize(void *handle) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return invalidate_captures();
  return stream == &driver().null_stream ? run_everything() : run_all(stream);
}

ENTRY cuStreamQuery(void *handle) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return invalidate_captures();
  static unsigned polls = 0;
  if (!stream->queue.empty() && ++polls % kPollsPerOp == 0)
    if (Result failed = run_until(stream, stream->num_done + 1)) return failed;
  return stream->queue.empty() ? SUCCESS : NOT_READY;
}

ENTRY cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  auto *event = static_cast<Event *>(event_handle);
  if (!stream || !driver().events.count(event)) return INVALID_HANDLE;
  if (event->capture) {  // the stream joins the capture that the event belongs to
    if (!stream->capture) {
      stream->capture = event->capture;
      stream->status = kCapturing;
      stream->capture_mode = event->stream->capture_mode;
      stream->tail.clear();
    }
    for (int node : event->tail) stream->tail.push_back(node);
    return SUCCESS;
  }
  if (stream->capture) return STREAM_CAPTURE_ISOLATION;
  if (!event->is_recorded) return SUCCESS;
  Stream *source = event->stream;
  u64 position = event->position;
  return issue(handle, {kEventNode, [=] { return run_until(source, position); }});
}

ENTRY cuEventCreate(void **handle, unsigned) {
  GATE(kContext);
  auto *event = new Event;
  driver().events.insert(event);
  *handle = event;
  return SUCCESS;
}

ENTRY cuEventDestroy(void *handle) {
  GATE(kContext);
  auto *event = static_cast<Event *>(handle);
  if (!driver().events.erase(event)) return INVALID_HANDLE;
  delete event;
  return SUCCESS;
}

ENTRY cuEventRecord(void *event_handle, void *handle) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  auto *event = static_cast<Event *>(event_handle);
  if (!stream || !driver().events.count(event)) return INVALID_HANDLE;
  event->stream = stream;
  event->capture = stream->capture;
  event->tail = stream->tail;
  event->is_recorded = !stream->capture;
  if (stream->capture) return SUCCESS;
  event->position = stream->num_issued + 1;
  return issue(handle, {kEventNode, [event] {
                          if (driver().events.count(event)) event->time_ms = now_ms();
                          return SUCCESS;
                        }});
}

ENTRY cuEventSynchronize(void *handle) {
  GATE(kContext);
  auto *event = static_cast<Event *>(handle);
  if (!driver().events.count(event)) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  return event->is_recorded ? run_until(event->stream, event->position) : SUCCESS;
}

static bool is_done(const Event *event) {
  return !driver().streams.count(event->stream) || event->stream->num_done >= event->position;
}

ENTRY cuEventQuery(void *handle) {
  GATE(kContext);
  auto *event = static_cast<Event *>(handle);
  if (!driver().events.count(event)) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  if (!event->is_recorded || is_done(event)) return SUCCESS;
  static unsigned polls = 0;
  if (++polls % kPollsPerOp == 0)
    if (Result failed = run_until(event->stream, event->stream->num_done + 1)) return failed;
  return is_done(event) ? SUCCESS : NOT_READY;
}

ENTRY cuEventElapsedTime(float *ms, void *start_handle, void *end_handle) {
  GATE(kContext);
  auto *start = static_cast<Event *>(start_handle), *end = static_cast<Event *>(end_handle);
  if (!driver().events.count(start) || !driver().events.count(end)) return INVALID_HANDLE;
  if (!start->is_recorded || !end->is_recorded) return INVALID_HANDLE;
  if (!is_done(start) || !is_done(end)) return NOT_READY;
  *ms = static_cast<float>(end->time_ms - start->time_ms);
  return SUCCESS;
}
