package attach

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Record is what is kept of an attachment across restarts of the daemon.
type Record struct {
	Volume      string `json:"volume"`          // its name, which is its export's
	ID          string `json:"id"`              // a name may be used again, an id never
	Generation  uint64 `json:"generation"`      // of caches, when it was attached
	Epoch       uint64 `json:"epoch,omitempty"` // of the volume, when it was attached
	Backend     string `json:"backend"`         // the identifier that the kernel keeps
	Index       int    `json:"index"`           // /dev/nbdN; -1 until the kernel has chosen
	Connections int    `json:"connections"`
	ReadOnly    bool   `json:"read_only"`
	// Lost says why the device fails all I/O for good; "" while it serves.
	Lost string `json:"lost,omitempty"`
}

// Device is the path of the device.
func (r Record) Device() string { return "/dev/" + deviceName(r.Index) }

// file is the durable list of records.
type file struct{ path string }

func (f file) load() ([]Record, error) {
	raw, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the attachments: %w", err)
	}
	var out []Record
	if err := json.Unmarshal(raw, &out); err != nil || len(raw) > recordsMax {
		return nil, fmt.Errorf("%s is damaged (%w): detach the devices by nbd-client -d, remove the file, and attach again", f.path, err)
	}
	return out, nil
}

// save replaces the file and returns when that is durable.
func (f file) save(list []Record) error {
	raw, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the attachments: %w", err)
	}
	if err := replaceFile(f.path, append(raw, '\n')); err != nil {
		return fmt.Errorf("writing the attachments: %w", err)
	}
	return nil
}

func replaceFile(path string, raw []byte) error {
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
