package nbdtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// WriteCertificates writes, into a directory, an authority and the certificates
// of a server (localhost, 127.0.0.1) and of a client, in the files that qemu and
// libnbd look for: {ca,server,client}-{cert,key}.pem. They are good for a day.
func WriteCertificates(dir string) error {
	var ca *x509.Certificate
	var caKey crypto.Signer
	for _, name := range []string{"ca", "server", "client"} {
		key, err := newKey(name)
		if err != nil {
			return fmt.Errorf("nbdtest: %w", err)
		}
		tmpl := certificate(name)
		if name == "ca" {
			ca, caKey = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key.Public(), caKey)
		if err != nil {
			return fmt.Errorf("nbdtest: %w", err)
		}
		if name == "ca" {
			if ca, err = x509.ParseCertificate(der); err != nil {
				return fmt.Errorf("nbdtest: %w", err)
			}
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("nbdtest: %w", err)
		}
		for file, b := range map[string]*pem.Block{
			name + "-cert.pem": {Type: "CERTIFICATE", Bytes: der},
			name + "-key.pem":  {Type: "PRIVATE KEY", Bytes: keyDER},
		} {
			if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(b), 0o600); err != nil { //nolint:forbidigo // a certificate for tests, no file of a replica
				return fmt.Errorf("nbdtest: %w", err)
			}
		}
	}
	return nil
}

// newKey makes an elliptic key, but for the client one of RSA, as openssl makes by
// default, and which not every client sends to every server.
func newKey(name string) (crypto.Signer, error) {
	if name == "client" {
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func certificate(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		serial = big.NewInt(time.Now().UnixNano())
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, IsCA: name == "ca",
		KeyUsage: x509.KeyUsageDigitalSignature,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if name == "ca" {
		c.KeyUsage |= x509.KeyUsageCertSign
	} else {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	return c
}
