// Stream capture and graphs.
#include "state.h"

using namespace stub;

namespace {

// Nodes that no other node and no joined stream comes after: work of a forked stream that was never joined.
bool has_unjoined_work(const Graph &graph, const Stream &origin) {
  std::set<int> loose;
  for (size_t i = 0; i < graph.nodes.size(); i++) loose.insert(static_cast<int>(i));
  for (auto &node : graph.nodes)
    for (int before : node->after) loose.erase(before);
  for (int node : origin.tail) loose.erase(node);
  return !loose.empty();
}

// Any order that keeps every node after those it depends on is legal; HOSTSIM_ORDER picks among them.
Result run_nodes(const std::vector<Node> &nodes, u64 seed) {
  std::vector<int> waiting_for(nodes.size());
  std::vector<std::vector<int>> followers(nodes.size());
  std::vector<int> ready;
  for (size_t i = 0; i < nodes.size(); i++) {
    waiting_for[i] = static_cast<int>(nodes[i].after.size());
    for (int before : nodes[i].after) followers[before].push_back(static_cast<int>(i));
    if (!waiting_for[i]) ready.push_back(static_cast<int>(i));
  }
  int order = driver().settings.order;
  while (!ready.empty()) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    size_t pick = order == 2 ? (seed >> 33) % ready.size() : order == 1 ? ready.size() - 1 : 0;
    int node = ready[pick];
    ready.erase(ready.begin() + static_cast<long>(pick));
    if (Result failed = nodes[node].op.run()) return failed;
    for (int next : followers[node])
      if (--waiting_for[next] == 0) ready.push_back(next);
  }
  return SUCCESS;
}

}  // namespace

ENTRY cuStreamBeginCapture(void *handle, int mode) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream == &driver().null_stream) return STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return ILLEGAL_STATE;
  stream->capture = new Graph;
  stream->tail.clear();
  stream->status = kCapturing;
  stream->capture_mode = mode;
  stream->is_origin = true;
  return SUCCESS;
}

ENTRY cuStreamEndCapture(void *handle, void **graph_handle) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  *graph_handle = nullptr;
  if (!stream) return INVALID_HANDLE;
  if (!stream->capture || !stream->is_origin) return ILLEGAL_STATE;
  Graph *graph = stream->capture;
  Result failed = stream->status == kInvalidated ? STREAM_CAPTURE_INVALIDATED
                  : has_unjoined_work(*graph, *stream) ? STREAM_CAPTURE_UNJOINED
                                                       : SUCCESS;
  for (auto *s : driver().streams)
    if (s->capture == graph) {
      s->capture = nullptr;
      s->status = kNotCapturing;
      s->is_origin = false;
      s->tail.clear();
    }
  for (auto *event : driver().events)
    if (event->capture == graph) event->capture = nullptr;
  if (failed) {
    delete graph;
    return failed;
  }
  driver().graphs.insert(graph);
  *graph_handle = graph;
  return SUCCESS;
}

ENTRY cuStreamIsCapturing(void *handle, int *status) {
  GATE(kContext);
  Stream *stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *status = stream->status;
  return SUCCESS;
}

ENTRY cuGraphGetNodes(void *handle, void **nodes, size_t *count) {
  GATE(kInit);
  auto *graph = static_cast<Graph *>(handle);
  if (!driver().graphs.count(graph)) return INVALID_HANDLE;
  if (!nodes) {
    *count = graph->nodes.size();
    return SUCCESS;
  }
  for (size_t i = 0; i < *count && i < graph->nodes.size(); i++) nodes[i] = graph->nodes[i].get();
  return SUCCESS;
}

ENTRY cuGraphNodeGetType(void *node, int *type) {
  GATE(kInit);
  *type = static_cast<Node *>(node)->op.type;
  return SUCCESS;
}

ENTRY cuGraphDestroy(void *handle) {
  GATE(kInit);
  auto *graph = static_cast<Graph *>(handle);
  if (!driver().graphs.erase(graph)) return INVALID_HANDLE;
  delete graph;
  return SUCCESS;
}

ENTRY cuGraphInstantiate(void **handle, void *graph_handle, u64) {
  GATE(kContext);
  auto *graph = static_cast<Graph *>(graph_handle);
  if (!driver().graphs.count(graph)) return INVALID_HANDLE;
  auto *exec = new GraphExec;
  for (auto &node : graph->nodes) exec->nodes.push_back(*node);
  driver().execs.insert(exec);
  *handle = exec;
  return SUCCESS;
}

ENTRY cuGraphExecDestroy(void *handle) {
  GATE(kContext);
  auto *exec = static_cast<GraphExec *>(handle);
  if (!driver().execs.count(exec)) return INVALID_HANDLE;
  Result failed = run_everything();
  driver().execs.erase(exec);
  delete exec;
  return failed;
}

ENTRY cuGraphUpload(void *handle, void *) {
  GATE(kContext);
  return driver().execs.count(static_cast<GraphExec *>(handle)) ? SUCCESS : INVALID_HANDLE;
}

ENTRY cuGraphLaunch(void *handle, void *stream) {
  GATE(kContext);
  auto *exec = static_cast<GraphExec *>(handle);
  if (!driver().execs.count(exec)) return INVALID_HANDLE;
  static u64 launches = 0;
  u64 seed = driver().settings.seed * 1000003 + ++launches;
  return issue(stream, {kKernelNode, [exec, seed] { return run_nodes(exec->nodes, seed); }});
}
