package buf

import "sync"

// Pool keeps values of one type for reuse, so that packages which must stay
// free of sync (replication/wire) can still recycle what they decode. The zero
// Pool is ready; it may be used from several goroutines.
type Pool[T any] struct{ p sync.Pool }

// Get returns a recycled value as Put left it, or a new zero one.
func (p *Pool[T]) Get() *T {
	if v, _ := p.p.Get().(*T); v != nil {
		return v
	}
	return new(T)
}

// Put recycles v. The caller has cleared what must not be seen again and does
// not touch v any more.
func (p *Pool[T]) Put(v *T) { p.p.Put(v) }
