package nbd

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
)

// ContextAllocation is the id of base:allocation in Request.Contexts and
// Status.Context. A session's MetaContext is not asked for it, and gives other
// contexts other ids.
const ContextAllocation uint32 = 0

// metaSelection is what SET_META_CONTEXT has selected. Contexts that only a
// session can judge (a log position that it may no longer have) open that
// session already here; GO for the same export takes it over.
type metaSelection struct {
	export  string
	session Session // nil if base:allocation alone is selected
	names   []string
	ids     []uint32
}

// of returns how many contexts are selected for the export.
func (m *metaSelection) of(export string) int {
	if m.export != export {
		return 0
	}
	return len(m.names)
}

// drop forgets the selection.
func (m *metaSelection) drop() {
	if m.session != nil {
		m.session.Close()
	}
	*m = metaSelection{}
}

// sessionOf returns the session that is open for the export, if there is one.
func (m *metaSelection) sessionOf(export string) Session {
	if m.export != export {
		return nil
	}
	return m.session
}

// take hands over the selection for an export, and its session; one for another
// export is void.
func (m *metaSelection) take(export string) ([]string, []uint32) {
	if m.export != export {
		m.drop()
	}
	names, ids := m.names, m.ids
	*m = metaSelection{}
	return names, ids
}

// wireContext is a context's id on the wire. It differs from the session's.
func wireContext(index int) uint32 { return uint32(index + 1) }

// metaOption parses the data of both meta context options:
//
//	u32 length | export name | u32 count | count times: u32 length | query
func metaOption(data []byte) (export string, queries []string, tooMany, ok bool) {
	export, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return "", nil, false, false
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	for i := uint32(0); i < count; i++ {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return "", nil, false, false
		}
		if !strings.Contains(q, ":") {
			return "", nil, false, false
		}
		if len(queries) == queriesMax {
			tooMany = true
			continue
		}
		queries = append(queries, q)
	}
	return export, queries, tooMany, len(rest) == 0
}

// matchContexts returns the contexts among those available that a query means.
// An available name that ends in a colon takes a parameter; a query that ends
// in one is a wildcard, which selects nothing when selecting.
func matchContexts(available []string, query string, selecting bool) []string {
	var found []string
	wildcard := strings.HasSuffix(query, ":")
	if wildcard && selecting {
		return nil
	}
	for _, name := range available {
		switch {
		case name == query,
			wildcard && strings.HasPrefix(name, query):
			found = append(found, name)
		case !wildcard && strings.HasSuffix(name, ":") && strings.HasPrefix(query, name):
			found = append(found, query)
		}
	}
	return found
}

// metaQuery is a meta context option that can be answered.
type metaQuery struct {
	export    string
	queries   []string
	available []string // the export's contexts
}

// openMeta judges what LIST_META_CONTEXT and SET_META_CONTEXT have in common.
// When it returns nil, out has the error.
func (n *negotiation) openMeta(data, out []byte) (*metaQuery, []byte) {
	export, queries, tooMany, ok := metaOption(data)
	switch {
	case !ok:
		return nil, n.fail(out, repErrInvalid, "malformed meta context query")
	case tooMany:
		return nil, n.fail(out, repErrTooBig, "too many queries")
	case !n.structured:
		return nil, n.fail(out, repErrInvalid, "negotiate structured replies first")
	}
	info, err := n.server.lookup(export)
	if err != nil {
		return nil, n.failExport(out, err)
	}
	return &metaQuery{export, queries, append([]string{AllocationContext}, info.MetaContexts...)}, out
}

// match returns the contexts that the queries mean, each once.
func (q *metaQuery) match(selecting bool) []string {
	var found []string
	for _, query := range q.queries {
		for _, name := range matchContexts(q.available, query, selecting) {
			if !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	return found
}

func (n *negotiation) listMeta(data, out []byte) []byte {
	q, out := n.openMeta(data, out)
	if q == nil {
		return out
	}
	found := q.available
	if len(q.queries) > 0 {
		found = q.match(false)
	}
	if len(found) > contextsMax {
		return n.fail(out, repErrTooBig, "too many meta contexts")
	}
	found, err := n.selectable(q, found)
	if err != nil {
		return n.failExport(out, err)
	}
	for _, name := range found {
		out = n.metaReply(out, 0, name)
	}
	return n.reply(out, repAck, nil)
}

// selectable returns those of the contexts found that SET_META_CONTEXT would select
// now. A name that takes a parameter stands for all that it makes, as the protocol
// allows; one that has its parameter is judged by a session, as it would be there. An
// error says that this cannot be told at the moment.
func (n *negotiation) selectable(q *metaQuery, found []string) ([]string, error) {
	m := metaSelection{export: q.export}
	defer m.drop()
	var out []string
	for _, name := range found {
		if !slices.Contains(q.available, name) {
			_, err := n.prepareContext(&m, name)
			if errors.Is(err, ErrInvalid) || errors.Is(err, ErrUnsupported) {
				continue
			}
			if err != nil {
				return nil, err
			}
		}
		out = append(out, name)
	}
	return out, nil
}

func (n *negotiation) setMeta(data, out []byte) []byte {
	n.meta.drop() // also when this one fails
	q, out := n.openMeta(data, out)
	if q == nil {
		return out
	}
	m := metaSelection{export: q.export, names: q.match(true)}
	if len(m.names) > contextsMax {
		return n.fail(out, repErrTooBig, "too many meta contexts")
	}
	for _, name := range m.names {
		id, err := n.prepareContext(&m, name)
		if err != nil {
			m.drop()
			return n.failExport(out, err)
		}
		m.ids = append(m.ids, id)
	}
	n.meta = m
	for i, name := range m.names {
		out = n.metaReply(out, wireContext(i), name)
	}
	return n.reply(out, repAck, nil)
}

// prepareContext asks the session for a context's id, and opens the session if
// this is the first that needs one.
func (n *negotiation) prepareContext(m *metaSelection, name string) (uint32, error) {
	if name == AllocationContext {
		return ContextAllocation, nil
	}
	if m.session == nil {
		s, err := n.server.open(m.export)
		if err != nil {
			return 0, err
		}
		m.session = s
	}
	return m.session.MetaContext(name)
}

// metaReply appends REP_META_CONTEXT: u32 id | name.
func (n *negotiation) metaReply(out []byte, id uint32, name string) []byte {
	p := binary.BigEndian.AppendUint32(nil, id)
	return n.reply(out, repMetaContext, append(p, name...))
}
