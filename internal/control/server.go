package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"time"
)

// requestBytesMax bounds the body of a request.
const requestBytesMax = 1 << 20

// Backend does what the API is asked for. The daemon implements it. Errors that
// are an *Error (wrapped or not) reach the client as they are.
type Backend interface {
	Status(ctx context.Context) (ClusterStatus, error)
	Volumes(ctx context.Context) ([]VolumeStatus, error)
	VolumeStatus(ctx context.Context, volume string) (VolumeStatus, error)
	// VolumeClients asks every node.
	VolumeClients(ctx context.Context, volume string) ([]VolumeClients, error)
	CreateVolume(ctx context.Context, r CreateVolume) (VolumeStatus, error)
	DeleteVolume(ctx context.Context, volume string) error
	ResizeVolume(ctx context.Context, volume string, r Resize) (VolumeStatus, error)
	SetOptions(ctx context.Context, volume string, r SetOptions) (VolumeStatus, error)
	Switchover(ctx context.Context, volume string, r Switchover) (VolumeStatus, error)
	Fence(ctx context.Context, volume string) (FenceResult, error)
	Failover(ctx context.Context, volume string, r Failover) (FailoverResult, error)
	Invalidate(ctx context.Context, volume string, r Invalidate) error
	// Verify calls progress now and then, and a last time with Done.
	Verify(ctx context.Context, volume string, r Verify, progress func(VerifyProgress) error) error
	// Events calls emit for each event after the cursor since ("": all that
	// are kept); with follow it goes on until ctx ends.
	Events(ctx context.Context, since string, follow bool, emit func(Event) error) error

	Nodes(ctx context.Context) ([]NodeStatus, error)
	AddNode(ctx context.Context, r AddNode) (AddedNode, error)
	RemoveNode(ctx context.Context, node string, r RemoveNode) (ChangedNode, error)
	ReplaceNode(ctx context.Context, node string) (ChangedNode, error)
	DrainNode(ctx context.Context, node string) error

	// Doctor looks at every node.
	Doctor(ctx context.Context) ([]Finding, error)
	// Reload reads the configuration again and applies what can change live.
	Reload(ctx context.Context) (Reloaded, error)

	Attach(ctx context.Context, volume string, r Attach) (Attachment, error)
	Detach(ctx context.Context, volume string) error
	Attachments(ctx context.Context) ([]Attachment, error)
}

// Handler serves the API. With readOnly what changes something is refused, and
// there are no profiles.
func Handler(b Backend, logger *slog.Logger, readOnly bool) http.Handler {
	mux := http.NewServeMux()
	get(mux, "GET /v1/status", func(r *http.Request) (any, error) { return b.Status(r.Context()) })
	get(mux, "GET /v1/volumes", func(r *http.Request) (any, error) { return b.Volumes(r.Context()) })
	get(mux, "GET /v1/volumes/{name}", func(r *http.Request) (any, error) {
		return b.VolumeStatus(r.Context(), r.PathValue("name"))
	})
	get(mux, "GET /v1/volumes/{name}/clients", func(r *http.Request) (any, error) {
		return b.VolumeClients(r.Context(), r.PathValue("name"))
	})
	get(mux, "GET /v1/nodes", func(r *http.Request) (any, error) { return b.Nodes(r.Context()) })
	get(mux, "GET /v1/doctor", func(r *http.Request) (any, error) { return b.Doctor(r.Context()) })
	get(mux, "GET /v1/attachments", func(r *http.Request) (any, error) { return b.Attachments(r.Context()) })
	mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		serveLines(w, func(emit func(any) error) error {
			return b.Events(r.Context(), q.Get("since"), q.Get("follow") == "true", func(e Event) error { return emit(e) })
		})
	})
	verifying(mux, b, readOnly)
	changing(mux, b)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, Errorf(CodeUsage, "this daemon may be older than the command: run blockstep of the same version", "the daemon knows no %s %s", r.Method, r.URL.Path))
	})
	if readOnly {
		return refuseChanges(mux)
	}
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return logChanges(mux, logger)
}

// changing adds the paths that change something.
func changing(mux *http.ServeMux, b Backend) {
	post(mux, "POST /v1/volumes", func(r *http.Request, in CreateVolume) (any, error) { return b.CreateVolume(r.Context(), in) })
	post(mux, "DELETE /v1/volumes/{name}", func(r *http.Request, _ struct{}) (any, error) {
		return nil, b.DeleteVolume(r.Context(), r.PathValue("name"))
	})
	post(mux, "POST /v1/volumes/{name}/resize", func(r *http.Request, in Resize) (any, error) {
		return b.ResizeVolume(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/options", func(r *http.Request, in SetOptions) (any, error) {
		return b.SetOptions(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/switchover", func(r *http.Request, in Switchover) (any, error) {
		return b.Switchover(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/fence", func(r *http.Request, _ struct{}) (any, error) {
		return b.Fence(r.Context(), r.PathValue("name"))
	})
	post(mux, "POST /v1/volumes/{name}/failover", func(r *http.Request, in Failover) (any, error) {
		return b.Failover(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/invalidate", func(r *http.Request, in Invalidate) (any, error) {
		return nil, b.Invalidate(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/attach", func(r *http.Request, in Attach) (any, error) {
		return b.Attach(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/volumes/{name}/detach", func(r *http.Request, _ struct{}) (any, error) {
		return nil, b.Detach(r.Context(), r.PathValue("name"))
	})
	post(mux, "POST /v1/reload", func(r *http.Request, _ struct{}) (any, error) { return b.Reload(r.Context()) })
	post(mux, "POST /v1/nodes", func(r *http.Request, in AddNode) (any, error) { return b.AddNode(r.Context(), in) })
	post(mux, "POST /v1/nodes/{name}/remove", func(r *http.Request, in RemoveNode) (any, error) {
		return b.RemoveNode(r.Context(), r.PathValue("name"), in)
	})
	post(mux, "POST /v1/nodes/{name}/replace", func(r *http.Request, _ struct{}) (any, error) {
		return b.ReplaceNode(r.Context(), r.PathValue("name"))
	})
	post(mux, "POST /v1/nodes/{name}/drain", func(r *http.Request, _ struct{}) (any, error) {
		return nil, b.DrainNode(r.Context(), r.PathValue("name"))
	})
}

// verifyPath is the one POST that may change nothing: without a repair.
const verifyPath = "POST /v1/volumes/{name}/verify"

// verifying adds the comparison of replicas. It reads; a repair writes.
func verifying(mux *http.ServeMux, b Backend, readOnly bool) {
	mux.HandleFunc(verifyPath, func(w http.ResponseWriter, r *http.Request) {
		var in Verify
		if err := decode(w, r, &in); err != nil {
			writeError(w, err)
			return
		}
		if in.Repair && readOnly {
			writeError(w, onlyReading())
			return
		}
		serveLines(w, func(emit func(any) error) error {
			return b.Verify(r.Context(), r.PathValue("name"), in, func(p VerifyProgress) error { return emit(p) })
		})
	})
}

func get(mux *http.ServeMux, pattern string, f func(*http.Request) (any, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		out, err := f(r)
		writeResult(w, out, err)
	})
}

func post[In any](mux *http.ServeMux, pattern string, f func(*http.Request, In) (any, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if err := decode(w, r, &in); err != nil {
			writeError(w, err)
			return
		}
		out, err := f(r, in)
		writeResult(w, out, err)
	})
}

// decode reads a JSON body; none at all is an empty one.
func decode(w http.ResponseWriter, r *http.Request, into any) error {
	if r.ContentLength == 0 {
		return nil
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, requestBytesMax))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return Errorf(CodeUsage, "the command may be newer than this daemon: run blockstep of the same version", "the request is not understood: %v", err)
	}
	return nil
}

func writeResult(w http.ResponseWriter, out any, err error) {
	if err != nil {
		writeError(w, err)
		return
	}
	if out == nil {
		out = struct{}{}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the client is gone: nobody to tell
}

func writeError(w http.ResponseWriter, err error) {
	e := asError(err)
	status := map[Code]int{
		CodeRefused: http.StatusConflict, CodeNotFound: http.StatusNotFound, CodeUsage: http.StatusBadRequest,
		CodeTimeout: http.StatusGatewayTimeout, CodeReadOnly: http.StatusForbidden,
	}[e.Code]
	if status == 0 {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(e)
}

// asError finds the *Error in err, or makes one.
func asError(err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.DeadlineExceeded):
		return Errorf(CodeTimeout, "it may still happen: look at blockstep status", "no answer in time: %v", err)
	}
	return Errorf(CodeFailed, "", "%v", err)
}

// serveLines streams JSON lines. An error before the first line is an answer
// like any other; a later one is the last line, as {"error": …}.
func serveLines(w http.ResponseWriter, run func(emit func(any) error) error) {
	enc, flush := json.NewEncoder(w), http.NewResponseController(w)
	begun := false
	begin := func() {
		if !begun {
			begun = true
			w.Header().Set("Content-Type", "application/x-ndjson")
			w.WriteHeader(http.StatusOK)
		}
	}
	err := run(func(line any) error {
		begin()
		if err := enc.Encode(line); err != nil {
			return fmt.Errorf("sending a line: %w", err)
		}
		return flush.Flush()
	})
	switch {
	case err != nil && !begun:
		writeError(w, err)
	case err != nil:
		_ = enc.Encode(asError(err))
	default:
		begin()
	}
}

func onlyReading() *Error {
	return Errorf(CodeReadOnly, "run the command on the node itself, with its admin socket (--admin unix:///run/blockstep/admin.sock)", "over TCP a daemon answers read-only verbs only")
}

func refuseChanges(next *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, pattern := next.Handler(r)
		if r.Method != http.MethodGet && r.Method != http.MethodHead && pattern != verifyPath {
			writeError(w, onlyReading())
			return
		}
		next.ServeHTTP(w, r)
	})
}

// logChanges writes a line for each request that changes something.
func logChanges(next http.Handler, logger *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			start := time.Now()
			defer func() {
				logger.Info("admin request", "method", r.Method, "path", r.URL.Path, "took", time.Since(start).Round(time.Millisecond))
			}()
		}
		next.ServeHTTP(w, r)
	})
}
