// Renders conversations with a Go text/template, handing over what Ollama hands over: the system's messages joined by an empty line
// as .System, and all messages as .Messages, neighbours of one role joined. Reads {"template", "conversations"} from stdin, writes a
// JSON list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type request struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

func joined(messages []message) (string, []message) {
	var system []string
	var found []message
	for _, each := range messages {
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		last := len(found) - 1
		if last >= 0 && found[last].Role == each.Role {
			found[last].Content += "\n\n" + each.Content
		} else {
			found = append(found, each)
		}
	}
	return strings.Join(system, "\n\n"), found
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	answers := [][]string{}
	for _, asked := range requests {
		parsed := template.Must(template.New("").Option("missingkey=error").Parse(asked.Template))
		texts := []string{}
		for _, messages := range asked.Conversations {
			system, all := joined(messages)
			var text strings.Builder
			values := map[string]any{"System": system, "Messages": all, "Response": ""}
			if err := parsed.Execute(&text, values); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		answers = append(answers, texts)
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
