package replication

import "fmt"

// debug tells what a volume waits for.
func (v *Volume) debug() string {
	s := v.Status()
	v.cmu.Lock()
	defer v.cmu.Unlock()
	out := fmt.Sprintf("view %+v, up %v, held %d, table %d", *v.view, v.up, len(v.held), len(v.table))
	for _, r := range v.table {
		out += fmt.Sprintf(" [op %d to %s]", r.Op, r.target)
	}
	if v.rep() != nil {
		out += fmt.Sprintf(", core %+v, gate %+v, barriers %d, failed %v", s.Core, v.rep().gate.load(), len(v.rep().barriers), v.rep().failedWith)
	}
	return out
}
